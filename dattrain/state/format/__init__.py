"""A checkpoint on the disk, without torch: ``dattrain ckpt ls`` and a login node read it at once.

``checkpoint`` knows folders (publish, list, find, check, verify, remove, recover), ``manifest`` what ``manifest.json`` says,
``rank_file`` one rank's safetensors file with its checksums, ``prefetch`` reads several of them, ``retention`` decides which
checkpoints are kept. docs/checkpoints.md is the format's description. Whoever needs tensors reads ``dattrain.state.gather``.
"""
