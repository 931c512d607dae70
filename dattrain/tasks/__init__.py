"""What is learned: the batch, the model that takes it, its loss, its evaluation and its metrics.

``base`` says what the engine asks of a task, ``create`` makes the one that a recipe means. Others use
``create.create_task`` and the protocols of ``base``.

Not here: layers and heads (``dattrain.models``), reading and augmenting samples (``dattrain.data``), and everything that is
the same for every task: updates, ZeRO, averages, checkpoints, log rows (``dattrain.engine``).
"""
