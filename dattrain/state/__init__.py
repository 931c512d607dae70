"""Checkpoints: what an engine's state is, written to and read from a folder at any world size and ZeRO stage.

``checkpointer.Checkpointer`` is all that the trainer needs. Below it: ``writer`` (a save's thread), ``load`` with ``relay``
(a resume), ``partition`` (what this rank has of DeepSpeed's state, as fragments), ``background`` (staging to host memory),
``dtypes``. ``gather`` gives full tensors to whoever has neither ranks nor DeepSpeed: ``iter_tensors``, ``load_tensors``,
``load_buffers``. ``format`` knows files and folders without torch, ``convert`` other programs' checkpoints. DeepSpeed is
named here and in ``dattrain.engine.zero`` alone.

Not here: when to save and what a checkpoint's ``meta`` holds (``dattrain.engine.trainer``), averaging the weights
(``dattrain.engine.ema``), what a resumed run may not change (``dattrain.engine.resume_rules``).
"""
