"""dattrain: pre-train and fine-tune DAT (Vision Transformer with Deformable Attention, CVPR 2022)."""

__version__ = "0.1.0"
