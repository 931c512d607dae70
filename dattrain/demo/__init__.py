"""The images of the demo: Fashion-MNIST's 10,000 test images and labels, as Zalando gave them out. Nothing else lives here.

``dattrain.cli.demo`` packs and trains on them; ``importlib.resources`` opens them.
"""
