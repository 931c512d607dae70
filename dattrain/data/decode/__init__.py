"""Decoding: encoded micro-batches (``feed.Encoded``) to uint8 ones.

``cpu.CpuDecoder`` runs in worker processes, as does ``dense.SegmentationDecoder``, of images with maps; ``dali.DaliDecoder`` and
``dali_dense.DaliSegmentationDecoder`` on the GPU, by the graphs of ``dali_pipeline``, where ``dali_probe`` found that to work. ``images`` is the one place that decodes or
measures a single image on the CPU. Which decoder a recipe gets is decided in ``dattrain.data.factory`` and ``dense_factory``.
"""
