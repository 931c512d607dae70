"""Weights outside of a training: opening, predicting with, importing and exporting them.

- ``weights``: ``load_model`` opens a run folder, checkpoint or weights file, ``save`` writes one.
- ``pretrained_cfg``: ``PretrainedCfg``, what is known of weights beside the tensors, as timm's pretrained config.
- ``preprocess``: image files, PIL images and arrays as the model's input; ``predict``: their classes; ``class_names``: for people.
- ``import_authors``: the authors' files; ``export`` (``formats``, ``export_authors``, ``export_timm``, ``export_graph``): files for
  other programs, compared with the model by ``exported``.
- ``import_checkpoint``, ``export_checkpoint``: states with optimizer from and to DeepSpeed, torch.distributed.checkpoint and timm.

The checkpoints of a training are in ``state``, the networks in ``models``. Evaluating weights is in ``evaluation``.
"""
