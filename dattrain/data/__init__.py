"""From files to batches on a device: which sample is next, where its bytes are, how it is decoded and augmented.

``factory`` makes the loaders of a recipe, and is what the engine calls; ``loader`` serves micro-batches (``batch.Batch``) to the
device. Under them, ``order`` says which sample stands at which position, ``feed`` reads its bytes and draws its augmentation,
``workers`` decodes in processes, ``stream`` is for what cannot be indexed, and ``classes`` and ``labels`` give a class its number.

``dense_factory`` makes the loaders of dense tasks of the same parts; their batches are ``dense_batch.SegmentationBatch``.

In ``source``: where samples come from. In ``decode``: images from bytes, on CPU and GPU. In ``augment``: what is drawn for a
sample, and how it is done. In ``prepare``: packing, indexing and checking sets before a run. How a batch is trained on is
decided in ``dattrain.engine`` and ``dattrain.tasks``; nothing here knows a model.
"""
