"""The most likely classes of images, with their names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dattrain.errors import UserError
from dattrain.models.dat import DAT
from dattrain.pretrained import class_names, preprocess
from dattrain.pretrained.pretrained_cfg import PretrainedCfg


class Prediction(NamedTuple):
    """A class that an image may show. ``number`` is the class's, from 0; ``probability`` the softmax's."""

    name: str
    probability: float
    number: int


def predict(
    model: DAT,
    cfg: PretrainedCfg,
    images: Sequence[str | Path | Image.Image | np.ndarray | Tensor],
    *,
    topk: int = 5,
    batch: int = 16,
    names: Sequence[str] | None = None,
) -> list[list[Prediction]]:
    """Classify images, prepared as the weights want them.

    Args:
        model: in evaluation mode, as ``load_model`` gives it, on the device that is to be used.
        cfg: as ``load_model`` gives it beside the model.
        images: files, PIL images, arrays uint8 (H x W, or H x W x 3, RGB) or tensors uint8 (3 x H x W), of any sizes.
        topk: classes per image at most.
        batch: images at a time.
        names: of the classes, in the order of the head; None takes those of the weights, else ``class 7``.

    Returns:
        Per image its ``topk`` classes, the most likely first.

    Raises:
        UserError: the model has no classification head, or a file cannot be read as an image.
    """
    if topk < 1 or batch < 1:
        raise UserError(f"topk {topk} and batch {batch} must be at least 1", exit_code=2)
    if not cfg.num_classes:
        raise UserError(f"{cfg.source or cfg.name}: has no classification head, so it knows no classes")
    if names is None:
        names = class_names.names(cfg.num_classes, cfg.labels, cfg.classes)
    device = next(model.parameters()).device
    found: list[list[Prediction]] = []
    for first in range(0, len(images), batch):
        pixels = [
            preprocess.prepare(preprocess.as_pixels(each), cfg) for each in images[first : first + batch]
        ]
        with torch.inference_mode():
            logits = model(preprocess.normalise(torch.stack(pixels), cfg, device))
            best = logits.float().softmax(1).topk(min(topk, cfg.num_classes))
        found += [
            [Prediction(names[index], value, index) for value, index in zip(values, indices)]
            for values, indices in zip(best.values.tolist(), best.indices.tolist())
        ]
    return found
