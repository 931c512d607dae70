"""The C++ library of the ``native`` backend: its sources, ``build`` (compile, load) and ``bindings`` (call it).

Attention is called from ``ops.deformable_attention.backend_native``, sampling, depthwise convolution and window attention
through ``bindings``. Whether it runs on this machine is ``build.status()``; which backend an operator takes is decided in
``ops.dispatch``.
"""
