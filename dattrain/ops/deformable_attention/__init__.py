"""The core of deformable attention: ``api`` checks and chooses, ``torch_op`` is the torch operator, ``backend_*`` compute.

A backend's file is named as the user types it: ``backend_reference``, ``backend_torch`` (with ``torch_bias``),
``backend_native`` (C++ in ``ops.cpp``), ``backend_triton`` (with ``triton_kernels`` and ``triton_planes``). They share
``coordinates`` and ``layout``. The layer around the core, with its projections and offsets, is ``models.deformable``.

Call ``dattrain.ops.deform_attention``; ``coordinates`` may be imported too.
"""
