"""Fashion-MNIST's test images, which ``dattrain demo`` and checks on real images use, and what the demo shows at its end.

The images and labels are files of this folder; ``results`` draws. The commands of the demo are in ``cli.demo``.
"""
