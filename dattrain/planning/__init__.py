"""What a run needs and what a machine has, before anything is queued.

- ``plan``: ``plan(config, Resources(...))``: memory, steps, hours, reading, saving.
- ``lr_range``: the learning-rate range test of ``dattrain lr-find``.
- ``memory``: bytes per device, from the model on fake tensors and from what DeepSpeed keeps.
- ``machine``: the checks of ``dattrain doctor``.

Submitting is in ``submit``; what a run really used is in ``observe``.
"""
