"""What a run needs and what a machine has, before anything is queued.

- ``plan``: ``plan(config, Resources(...))``: memory, steps, hours, reading, saving.
- ``machine``: the checks of ``dattrain doctor``.

Submitting is in ``submit``; what a run really used is in ``observe``.
"""
