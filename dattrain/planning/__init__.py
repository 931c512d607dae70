"""What a run needs and what a machine has, before anything is queued.

- ``plan``: ``plan(config, Resources(...))``: memory, steps, hours, reading, saving.
- ``decoding``: cores for a rate of training.
- ``scaling_table``: an update on several numbers of devices, by the model in ``scaling`` and ``network``.
- ``lr_range``: the learning-rate range test of ``dattrain lr-find``.
- ``machine``: the checks of ``dattrain doctor``.

Submitting is in ``submit``; what a run really used is in ``observe``.
"""
