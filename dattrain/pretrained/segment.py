"""The class of every pixel of images, by a segmentation network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dattrain.errors import ConfigError, UserError
from dattrain.models.dense.segmenter import Segmenter
from dattrain.palette import overlay
from dattrain.pretrained import class_names, preprocess
from dattrain.pretrained.pretrained_cfg import NETWORKS, Network, PretrainedCfg
from dattrain.pretrained.recipe_model import dense_recipe
from dattrain.tasks.dense_inference import Inference, decide


class Share(NamedTuple):
    """A class of an image. ``number`` is the class's, from 0; ``share`` is of the image's pixels, 0 to 1."""

    name: str
    share: float
    number: int


@dataclass(frozen=True)
class Segmentation:
    """What an image shows where.

    Attributes:
        pixels: H x W x 3 uint8 RGB: the image, upright.
        classes: H x W uint8, the number of each pixel's class.
        confidence: H x W float32, the probability of that class.
        names: of all classes, by number.
    """

    pixels: NDArray[np.uint8]
    classes: NDArray[np.uint8]
    confidence: NDArray[np.float32]
    names: tuple[str, ...]

    def __repr__(self) -> str:
        height, width = self.classes.shape
        shown = ", ".join(f"{share.name} {share.share:.1%}" for share in self.shares()[:5])
        return f"Segmentation({height} x {width}: {shown})"

    def shares(self) -> list[Share]:
        """The classes that are there, the largest first."""
        counts = np.bincount(self.classes.reshape(-1), minlength=len(self.names))
        order = sorted(np.flatnonzero(counts).tolist(), key=lambda number: (-counts[number], number))
        return [
            Share(self.names[number], float(counts[number] / self.classes.size), number) for number in order
        ]

    def overlay(self) -> NDArray[np.uint8]:
        """The image under the colours of its classes, H x W x 3 uint8 RGB; a class called ``background`` has none."""
        return overlay(self.pixels, self.classes, self.names)


def segment(
    model: Network,
    cfg: PretrainedCfg,
    images: Sequence[str | Path | Image.Image | np.ndarray | Tensor],
    *,
    names: Sequence[str] | None = None,
) -> Iterator[Segmentation]:
    """Find the class of every pixel; images are prepared as the weights want them, and each is run alone.

    Args:
        model: a segmentation network in evaluation mode, as ``load_model`` gives it, on the device that is to be used.
        cfg: as ``load_model`` gives it beside the model.
        images: files and PIL images, turned as their EXIF orientation says; arrays uint8 (H x W, or H x W x 3, RGB) or tensors
            uint8 (3 x H x W). Of any sizes.
        names: of the classes, in the order of the head; None takes those of the weights, else ``class 7``.

    Yields:
        One for each image, when it is asked for: a photograph's arrays take a hundred megabytes.

    Raises:
        ConfigError: an image classifier.
        UserError: a file that cannot be read as an image, or weights that take other images than of three channels.
    """
    if not isinstance(model, Segmenter):
        raise ConfigError(f"{cfg.source or cfg.name}: is {NETWORKS[cfg.task]}, not a segmentation network")
    if cfg.in_chans != 3:
        raise UserError(f"this model takes {cfg.in_chans} channels, and an image file gives 3")
    known = tuple(names or class_names.names(cfg.num_classes, cfg.labels, cfg.classes))
    device = next(model.parameters()).device
    inference = Inference(dense_recipe(cfg), torch.float32)
    for image in images:
        pixels = preprocess.as_pixels(image, upright=True)
        with torch.inference_mode():
            views = inference.views(model, pixels.to(device))
            height, width = pixels.shape[1:]
            found = decide(views, (height, width))
        yield Segmentation(
            preprocess.array(pixels), found.classes.cpu().numpy(), found.confidence.cpu().numpy(), known
        )
