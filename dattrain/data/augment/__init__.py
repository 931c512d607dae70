"""Augmentation: drawn on the host for each position, then carried out on pixels.

``plan.draw`` draws an ``AugmentPlan`` as a pure function of seed and positions; ``cpu_transforms`` (in the workers) and
``device_transforms`` (behind DALI) carry out crop, RandAugment and jitter alike; ``mixup`` normalises, erases and mixes on the
device (``MixupCutmix``, called by the engine). Of dense prediction, ``dense_plan`` draws a ``DensePlan`` and ``dense_transforms``
carries it out on image and map, and normalises. Random words come from ``dattrain.data.philox``.
"""
