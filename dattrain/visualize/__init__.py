"""Pictures of what deformable attention does: sampling points, their offsets, and the keys that a query reads.

- ``sampling_points``: ``capture`` gives the arrays of a forward pass; ``draw``, ``html``: figures and a page made of them.
- ``picture``: the whole picture, and the window of it that the network saw.
- ``draw_points``: one image with its sampling points on a matplotlib axis; what a notebook calls.

Charts of an evaluation are in ``evaluation.charts``, those of training data in ``data.prepare.stats``.
"""
