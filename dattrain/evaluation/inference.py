"""One pass of a frozen model over a data set: classes and probabilities, or features. Works under torchrun.

What is done with the results is in ``metrics`` and ``probe``; which images and labels make a set is in ``test_sets``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dattrain.config.schema import Config
from dattrain.data.batch import Batch
from dattrain.data.factory import eval_loader
from dattrain.data.loader import EvalLoader
from dattrain.engine.evaluate import AllRanks
from dattrain.errors import UserError
from dattrain.evaluation import metrics
from dattrain.pretrained.preprocess import normalise
from dattrain.pretrained.pretrained_cfg import PretrainedCfg, classes_of
from dattrain.runtime.progress import Progress
from dattrain.tasks.base import Ranks

T = TypeVar("T")


@dataclass(frozen=True)
class Views:
    """Test-time augmentation: class probabilities are averaged over the views of an image.

    ``flip`` adds the mirror image of each view; ``crops`` is 1 (the centre) or 5 (the corners of the central square of
    the resized image, and the centre).
    """

    flip: bool = False
    crops: int = 1

    def __call__(self, images: Tensor, size: tuple[int, int]) -> Iterator[Tensor]:
        """Views of ``size`` of B x C x H x W images (larger than ``size`` where there are five crops)."""
        (height, width), (h, w) = images.shape[-2:], size
        middle = ((height - h + 1) // 2, (width - w + 1) // 2)
        corners = [(0, 0), (0, width - w), (height - h, 0), (height - h, width - w)]
        for top, left in [middle, *corners] if self.crops == 5 else [middle]:
            view = images[..., top : top + h, left : left + w]
            yield view
            if self.flip:
                yield view.flip(-1)


@dataclass
class Result:
    """``records`` of the whole set (rank 0; None on other ranks), names of its images in the same order, and speed.

    ``keys`` are empty unless asked for. ``seconds`` is the whole pass, ``forward_seconds`` the network's part; both of
    this rank. ``bad`` counts images of the set that could not be read and were left out.
    """

    records: metrics.Records | None
    keys: list[str]
    images: int
    seconds: float
    forward_seconds: float
    bad: int


def open_loader(
    config: Config, cfg: PretrainedCfg, spec: str, views: Views, *, device: torch.device
) -> EvalLoader[Batch]:
    """A loader over ``spec`` that prepares images as ``cfg`` says; under torchrun, this rank's part."""
    augment = config.augment.model_copy(
        update={"mean": cfg.mean, "std": cfg.std, "interpolation": cfg.interpolation}
    )
    size, crop_pct = cfg.img_size, cfg.crop_pct
    if views.crops == 5:
        # The whole central square of the resized image is kept, and the crops are cut out of it on the device.
        size, crop_pct = tuple(int(side / crop_pct) for side in size), 1.0  # type: ignore[assignment]
        if size == cfg.img_size:
            raise UserError(
                f"--crops 5 needs a margin around the crop, and crop_pct={cfg.crop_pct} leaves none"
            )
    changed = config.model_copy(
        update={
            "model": config.model.model_copy(update={"num_classes": cfg.num_classes}),
            "data": config.data.model_copy(update={"val": spec, "labels": None}),
            "eval": config.eval.model_copy(update={"resize": cfg.resize, "crop_pct": crop_pct}),
            "augment": augment,
        }
    )
    rank, world = rank_and_world()
    return eval_loader(changed, classes_of(cfg), rank=rank, world=world, device=device, img_size=size)


@torch.inference_mode()
def classify(
    model: nn.Module,
    cfg: PretrainedCfg,
    loader: EvalLoader[Batch],
    *,
    device: torch.device,
    views: Views = Views(),
    among: np.ndarray | None = None,
    keep_keys: bool = False,
    title: str = "",
) -> Result:
    """Records of every image of the loader.

    Args:
        among: classes that count (ImageNet-A and -R have 200 of the 1,000); the others get no probability.
        keep_keys: also return the images' names.
    """
    masked = None
    if among is not None:
        masked = torch.full((cfg.num_classes,), -torch.inf, device=device)
        masked[torch.from_numpy(among).to(device)] = 0
    parts: list[metrics.Records] = []
    keys: list[tuple[int, str]] = []
    started, forward, right, seen = time.perf_counter(), 0.0, 0, 0
    with Progress(title, "batches", shown=rank_and_world()[0] == 0) as progress:
        for number, batch in enumerate(loader, 1):
            good = (batch.weight > 0).nonzero().squeeze(1)
            if len(good):
                images, labels = batch.images[good], batch.labels[good]
                before = now(device)
                x = as_input(images, cfg, device)
                probabilities: Tensor | None = None
                count = 0
                for view in views(x, cfg.img_size):
                    logits = model(view).float()
                    p = (logits if masked is None else logits + masked).softmax(1)
                    probabilities, count = (p if probabilities is None else probabilities + p), count + 1
                forward += now(device) - before
                assert probabilities is not None
                kept = metrics.record(probabilities / count, labels, batch.position[good.cpu()])
                parts.append(kept)
                right, seen = right + int(metrics.hits(kept, 1).sum()), seen + len(kept)
                if keep_keys:
                    keys += [(int(batch.position[i]), batch.keys[i]) for i in good.tolist()]
            progress(number, len(loader), f", top-1 {100 * right / max(seen, 1):.2f} %")
    seconds = time.perf_counter() - started
    gathered = gather((parts, keys, loader.skipped.count))
    if gathered is None:
        return Result(None, [], seen, seconds, forward, loader.skipped.count)
    records = [part for each, _, _ in gathered for part in each]
    if not records:
        raise UserError(f"{loader.dataset.name}: no image could be used")
    names = [key for _, key in sorted(pair for _, each, _ in gathered for pair in each)]
    return Result(metrics.join(records), names, seen, seconds, forward, sum(bad for _, _, bad in gathered))


@torch.no_grad()
def features(
    model: nn.Module,
    cfg: PretrainedCfg,
    loader: EvalLoader[Batch],
    *,
    device: torch.device,
    limit: int | None = None,
    title: str = "",
) -> tuple[Tensor, Tensor]:
    """Pooled features before the classifier, N x C float32, and labels N int64, on the CPU, in the set's order.

    On ranks other than 0 both are empty. ``limit`` stops after so many images of a rank.
    """
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    seen = 0
    with Progress(title, "batches", shown=rank_and_world()[0] == 0) as progress:
        for number, batch in enumerate(loader, 1):
            good = (batch.weight > 0).nonzero().squeeze(1)
            if len(good):
                x = as_input(batch.images[good], cfg, device)
                pooled = model.forward_head(model.forward_features(x), pre_logits=True)  # type: ignore[operator]
                labels = batch.labels[good].cpu()
                parts.append((batch.position[good.cpu()], pooled.float().cpu(), labels))
                seen += len(good)
            progress(number, len(loader))
            if limit is not None and seen >= limit:
                break
    gathered = gather(parts)
    if gathered is None:
        return torch.empty(0, 0), torch.empty(0, dtype=torch.int64)
    position, values, labels = (torch.cat(each) for each in zip(*(p for rank in gathered for p in rank)))
    order = position.argsort()
    return values[order], labels[order]


def as_input(images: Tensor, cfg: PretrainedCfg, device: torch.device) -> Tensor:
    """A loader's images as float32: pixels (uint8) are normalised, others have been."""
    return normalise(images, cfg, device) if images.dtype == torch.uint8 else images.float()


def rank_and_world() -> tuple[int, int]:
    """(rank, world) of the process group, (0, 1) without one."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


class Alone:
    """The exchanges of one process; see ``dattrain.tasks.base.Ranks``."""

    def sum(self, values: Tensor) -> None:
        """They are the sum."""

    def gather(self, value: Any) -> list[Any]:
        """Its own."""
        return [value]

    def gather_to_first(self, value: Any) -> list[Any]:
        """Its own."""
        return [value]

    def on_first(self, function: Callable[[], T]) -> T:
        """What it gives."""
        return function()


def ranks() -> Ranks:
    """The exchanges of the process group, or of this process without one."""
    return AllRanks() if rank_and_world()[1] > 1 else Alone()


def gather(item: object) -> list[Any] | None:
    """Every rank's item on rank 0, None elsewhere."""
    rank, world = rank_and_world()
    if world == 1:
        return [item]
    out: list[Any] | None = [None] * world if rank == 0 else None
    dist.gather_object(item, out)
    return out


def now(device: torch.device) -> float:
    """Seconds; on CUDA after what was queued is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
