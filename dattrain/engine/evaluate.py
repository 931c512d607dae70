"""Top-1, top-5 and loss over ``data.val``, each image once over all ranks.

Beyond these three (per class, calibration, files per image) is ``dattrain eval``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from dattrain.config.schema import Config
from dattrain.data.augment.mixup import Normalize
from dattrain.data.loader import EvalLoader
from dattrain.data.to_device import to_device
from dattrain.engine.step import DTYPES


class Interrupted(Exception):
    """All ranks agreed to leave the evaluation."""


@torch.no_grad()
def evaluate(
    engine: Any,
    loader: EvalLoader,
    config: Config,
    device: torch.device,
    *,
    leave: Callable[[], bool] = lambda: False,
    beat: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Evaluate ``engine`` (its current weights); collective. Returns top1 and top5 in percent, loss, images.

    Args:
        leave: asked before each batch; if it says yes on one rank, all leave together.
        beat: called after each batch.

    Raises:
        Interrupted: ``leave`` was true somewhere.
    """
    engine.eval()
    normalize = Normalize(config.augment)
    dtype = DTYPES[config.train.precision]
    top = min(5, config.model.num_classes)
    # correct@1, correct@5, loss, images, ranks that want to leave
    sums = torch.zeros(5, dtype=torch.float64, device=device)
    try:
        for batch in loader:
            asked = to_device(torch.tensor(float(leave())), device)
            dist.all_reduce(asked)
            if asked.item() > 0:
                raise Interrupted
            images = normalize(batch.images).to(dtype)
            if config.train.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            if len(batch):
                logits = engine(images).float()
            elif config.zero.stage == 3:
                # The other ranks gather weights in this batch; so must this one, on an image of nothing.
                engine(images.new_zeros(1, *images.shape[1:]))
                continue
            else:
                continue
            weight = batch.weight.double()
            losses = F.cross_entropy(logits, batch.labels, reduction="none").double()
            hits = logits.topk(top, dim=1).indices == batch.labels[:, None]
            sums[0] += (hits[:, 0] * weight).sum()
            sums[1] += (hits.any(dim=1) * weight).sum()
            sums[2] += (losses * weight).sum()
            sums[3] += weight.sum()
            beat()
    finally:
        engine.train()
    dist.all_reduce(sums)
    top1, top5, loss, images_seen, _ = sums.tolist()
    count = max(images_seen, 1.0)
    return {
        "top1": 100 * top1 / count,
        "top5": 100 * top5 / count,
        "loss": loss / count,
        "images": images_seen,
    }
