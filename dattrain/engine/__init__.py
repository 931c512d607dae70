"""Training: the loop, one update, DeepSpeed, the optimizer, and what a run folder says of itself.

``train`` sets a process up and ``trainer`` holds the loop; ``step``, ``zero``, ``optim``, ``schedule``, ``ema`` and
``activation_checkpointing`` are one update and its parts; ``session`` is a model at one image size. Others import
``train.train``, ``session.open_session``, ``resume_rules`` (no torch), ``precision`` and ``rank_zero.newest_checkpoint``.

Not here: what is learned (``dattrain.tasks``), checkpoints (``dattrain.state``), measurements and their rows
(``dattrain.observe``), signals and process groups (``dattrain.runtime``), evaluation after training (``dattrain.evaluation``).
"""
