"""What ``export`` can write, by name. Without torch, since the command line's help lists them."""

from __future__ import annotations

from pathlib import Path

SUFFIX = {
    "safetensors": ".safetensors",
    "authors": ".pth",
    "timm": "",
    "hub": "",
    "onnx": ".onnx",
    "torch.export": ".pt2",
}
"""Suffix of the file of each format; timm's and the hub's are folders."""
FORMATS = tuple(SUFFIX)
GRAPHS = ("onnx", "torch.export")
"""Those that hold one graph per image size; the others hold weights, laid out for one."""
LOWEST_OPSET = 18
"""Lowest ONNX opset: torch.onnx has no operators below; it would convert, fail on ``Pad``, and give 18 under another number."""


def output_path(out: Path, to: str, img_size: tuple[int, int] | None = None) -> Path:
    """The file to write: with the format's suffix, and with ``img_size`` in its name where several graphs are written."""
    suffix = SUFFIX[to]
    if suffix and out.suffix != suffix:
        out = out.with_name(out.name + suffix)
    if img_size is not None:
        height, width = img_size
        out = out.with_name(f"{out.stem}_{height}x{width}{out.suffix}")
    return out
