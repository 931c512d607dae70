"""What ``dattrain eval`` finds out: the metrics of trained weights over a data set.

- ``evaluate``: ``evaluate(path, Options(...))``, everything of one model; what a notebook calls.
- ``inference``: the loop over the images, on one rank or several; ``metrics``: what is computed from its records.
- ``test_sets``: ImageNet's other test sets; ``probe``: nearest neighbours and a linear classifier on frozen features.
- ``summary`` and ``charts``: results as text, tables and pictures.

Opening weights is in ``pretrained``. The evaluation during training is the task's (``engine``), with the same loader.
"""
