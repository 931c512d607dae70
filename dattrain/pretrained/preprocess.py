"""Image files as a model wants them: decode, resize, centre crop, normalise, as a pretrained config says; and the reverse for drawing."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from dattrain.data.augment.cpu_transforms import resize_window
from dattrain.data.augment.dense_plan import resized_size
from dattrain.data.augment.plan import eval_geometry
from dattrain.data.decode import images
from dattrain.data.decode.images import is_image_name
from dattrain.data.source.files import read_file
from dattrain.errors import UserError
from dattrain.pretrained.pretrained_cfg import PretrainedCfg

_NAMED = 5
"""Skipped files that are named."""
_ORIENTATION = 0x0112
"""The tag of EXIF 2.32, 4.6.4."""


def find(paths: Iterable[str | Path]) -> list[Path]:
    """Image files named, and those in folders named (sorted, not deeper); what is skipped there is said on stderr.

    Raises:
        UserError: a path does not exist, or a folder holds no image.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            entries = sorted(p for p in path.iterdir() if not p.name.startswith("."))
            inside = [p for p in entries if p.is_file() and is_image_name(p.name)]
            others = [p.name + "/" * p.is_dir() for p in entries if p not in inside]
            more = ", ..." if len(others) > _NAMED else ""
            skipped = f"{', '.join(others[:_NAMED])}{more}"
            if not inside:
                holds = f" (it holds {skipped})" if others else ""
                raise UserError(f"{path}: a folder without images{holds}")
            if others:
                print(f"{path}: {len(others)} skipped: {skipped}", file=sys.stderr)
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise UserError(f"{path}: no such image")
    return found


def read(path: Path, *, upright: bool = False) -> Tensor:
    """RGB pixels of a file, 3 x H x W uint8; ``upright`` turns them as its EXIF orientation says. Raises UserError for what is not an image."""
    try:
        data = read_file(path)
        pixels = images.decode(data)
        return _turned(pixels, data) if upright else pixels
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except images.BadImage as error:
        raise UserError(f"{path}: {error}") from None


def _turned(pixels: Tensor, data: bytes) -> Tensor:
    """``pixels`` of an encoded image, as its EXIF orientation has them shown."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # Pillow raises many types; the pixels have been decoded
        return pixels
    if value in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 2)
    axes = {2: (2,), 3: (1, 2), 4: (1,), 6: (2,), 7: (1, 2), 8: (1,)}.get(value, ())
    return pixels.flip(axes)


def as_pixels(image: str | Path | Image.Image | np.ndarray | Tensor, *, upright: bool = False) -> Tensor:
    """RGB pixels 3 x H x W uint8 of a file, a PIL image, an array (H x W or H x W x 3 uint8) or such a tensor.

    ``upright``: a file or a PIL image is turned as its EXIF orientation says.

    Raises:
        UserError: a file that is not an image; an array or tensor of another shape or dtype; anything else.
    """
    if isinstance(image, (str, Path)):
        return read(Path(image), upright=upright)
    if isinstance(image, Image.Image):
        image = ImageOps.exif_transpose(image) if upright else image
        image = np.asarray(image.convert("RGB"))
    if not isinstance(image, (np.ndarray, Tensor)):
        raise UserError(f"an image that is {image!r}: give a file, a PIL image, an array or a tensor")
    shape = tuple(image.shape)
    if isinstance(image, np.ndarray):
        fits = image.dtype == np.uint8 and (len(shape) == 2 or (len(shape) == 3 and shape[2] == 3))
    else:
        fits = image.dtype == torch.uint8 and len(shape) == 3 and shape[0] == 3
    if not fits or 0 in shape:
        raise UserError(
            f"an image of shape {shape} and {image.dtype}: give uint8, a tensor of 3 x H x W or an array of H x W or "
            "H x W x 3, of one pixel at least"
        )
    return image if isinstance(image, Tensor) else from_array(image)


def prepare(image: Tensor, cfg: PretrainedCfg) -> Tensor:
    """Resize and centre crop for evaluation: 3 x H x W uint8 to 3 x ``cfg.img_size`` uint8; for dense prediction the whole, its ratio kept."""
    height, width = image.shape[1:]
    if cfg.sides is not None:
        size = resized_size(height, width, short_side=cfg.sides[0], long_side=cfg.sides[1])
        return resize_window(image, size, (0, 0), size, cfg.interpolation)
    resized, corner = eval_geometry(height, width, cfg.img_size, resize=cfg.resize, crop_pct=cfg.crop_pct)
    return resize_window(image, resized, corner, cfg.img_size, cfg.interpolation)


def normalise(batch: Tensor, cfg: PretrainedCfg, device: torch.device | str = "cpu") -> Tensor:
    """B x 3 x H x W uint8 to the model's input, float32: (x / 255 - mean) / std; one channel is the mean of three.

    Raises:
        UserError: the model takes other images than of one or three channels.
    """
    if cfg.in_chans not in (1, 3):
        raise UserError(
            f"this model takes {cfg.in_chans} channels, and an image file gives 3 (or their mean, 1)"
        )
    x = batch.to(device).float() / 255
    mean, std = (torch.tensor(each, device=x.device).view(1, -1, 1, 1) for each in (cfg.mean, cfg.std))
    if cfg.in_chans == 1:
        x, mean, std = x.mean(1, keepdim=True), mean.mean(1, keepdim=True), std.mean(1, keepdim=True)
    return (x - mean) / std


def padded_size(height: int, width: int, cfg: PretrainedCfg) -> tuple[int, int]:
    """Of a prepared image as a detector sees it, zeros at its right and at its bottom; other networks see it as it is."""
    step = 1 if cfg.detection is None else cfg.detection.pad_to
    return -(-height // step) * step, -(-width // step) * step


def model_input(image: Tensor, cfg: PretrainedCfg, device: torch.device | str = "cpu") -> Tensor:
    """A prepared image (3 x H x W uint8) as the model's input: 1 x C x ``padded_size`` float32. Raises UserError as ``normalise``."""
    x = normalise(image[None], cfg, device)
    height, width = padded_size(x.shape[2], x.shape[3], cfg)
    return F.pad(x, (0, width - x.shape[3], 0, height - x.shape[2]))


def from_array(image: np.ndarray) -> Tensor:
    """H x W or H x W x 3 uint8 to 3 x H x W."""
    pixels = torch.from_numpy(np.array(image))
    return pixels.expand(3, -1, -1) if pixels.dim() == 2 else pixels.permute(2, 0, 1)


def image_size(values: Sequence[int] | None) -> tuple[int, int] | None:
    """(height, width) of ``--img-size N`` or ``HEIGHT WIDTH``, in pixels. Raises UserError for more numbers."""
    if not values:
        return None
    if len(values) > 2 or min(values) < 1:
        raise UserError(f"--img-size {' '.join(map(str, values))}: one side, or height and width, in pixels")
    return values[0], values[-1]


def array(image: Tensor) -> np.ndarray:
    """3 x H x W uint8 to H x W x 3 for drawing."""
    return image.permute(1, 2, 0).cpu().numpy()
