"""Checkpoints of the authors' code: ``convert.from_authors`` and ``convert.to_authors`` are what others import.

``architecture`` (CVPR code) and ``architecture_datpp`` find out which model a file holds; ``names`` and ``names_datpp``
join its tensors to ours. Files are read and written in ``dattrain.pretrained``.
"""
