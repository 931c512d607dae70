"""What a training of one's own images is set to, by how many there are and where it runs, each value with its reason. Pure.

``cli.own_images`` asks here once and writes the answers into the run folder; a restart reads them there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import log10, sqrt
from typing import Any, Literal

from dattrain.config.values import Size


@dataclass(frozen=True)
class Images:
    """What was found in the folder."""

    train: int
    """Images to train on."""
    val: int
    classes: int
    side: int
    """Median of the shorter sides, in pixels."""


@dataclass(frozen=True)
class Machine:
    """Where it runs."""

    device: Literal["cpu", "cuda"]
    devices: int = 1
    """Ranks, each with a device."""
    cores: int = 2
    """Of the host, for all ranks."""
    bf16: bool = False
    """Whether the device multiplies in bfloat16."""


@dataclass(frozen=True)
class Weights:
    """What a fine-tune starts from."""

    path: str
    """What ``init.from`` is to name."""
    name: str
    img_size: Size
    overrides: Mapping[str, Any] = field(default_factory=dict)
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    resize: str = "shorter"
    crop_pct: float = 0.875
    interpolation: str = "bicubic"
    shared: int = 0
    """Classes of the images that its head has a row for, by name."""


@dataclass(frozen=True)
class Choice:
    """A value and why it is that."""

    value: Any
    reason: str


FEW = 50_000
"""Images below which a network that starts from nothing learns little beside one that was trained before."""
GIVEN = "given"
"""Reason of a value that was asked for."""


def choose(
    images: Images, machine: Machine, weights: Weights | None = None, given: Mapping[str, Any] | None = None
) -> dict[str, Choice]:
    """Settings by dotted key, in the order of the schema.

    Args:
        given: values that are asked for; those that depend on them follow.
    """
    given = given or {}
    found: dict[str, Choice] = {}

    def take(key: str, value: Any, reason: str) -> Any:
        found[key] = Choice(given[key], GIVEN) if key in given else Choice(value, reason)
        return found[key].value

    cpu, n, tuned = machine.device == "cpu", images.train, weights is not None
    where = "a CPU" if cpu else "a GPU"
    small = _model(take, images, cpu, weights)
    # One shard: its window is all of it.
    take("data.lanes", 1, "an image folder is shuffled as a whole")
    workers = max(1, min(4 if cpu else 16, machine.cores // machine.devices - 1))
    take("data.workers", workers, f"{machine.cores} cores for {machine.devices} device(s)")
    _augment(take, n, cpu, weights)
    if weights is not None:
        take("eval.resize", weights.resize, "as the weights are evaluated")
        take("eval.crop_pct", weights.crop_pct, "as the weights are evaluated")

    batch = _batch(n, machine)
    batch = take(
        "train.global_batch",
        batch,
        f"at least 8 updates an epoch of {n:,} images" if n >= 64 else f"{n} images",
    )
    epochs, seen = _epochs(n, cpu, tuned, small)
    epochs = take("schedule.epochs", epochs, f"{seen}: {epochs * n:,} images on {where}")
    rounds = take("eval.every_epochs", max(1, round(epochs / 10)), "about ten evaluations")
    base, at = (2e-3, 128) if small else (1e-3, 1024)
    peak = base * sqrt(batch / at) * (0.4 if tuned else 1.0)
    rule = f"{base:g} at a batch of {at}, by the square root of the batch"
    lr = take("optim.lr", _round(peak), rule + (", times 0.4 for a fine-tune" if tuned else ""))
    take("optim.lr_batch", batch, "the rates are stated at train.global_batch")
    warm = round(epochs * (0.1 if tuned else 0.05), 2)
    take("schedule.warmup_epochs", warm, "a tenth of a fine-tune" if tuned else "a twentieth of the epochs")
    take("schedule.min_lr", _round(lr / 100), "a hundredth of the peak")
    take("schedule.warmup_lr", _round(lr / 100), "a hundredth of the peak")
    if cpu:
        share = batch // machine.devices if batch % machine.devices == 0 else batch
        take("train.micro_batch", min(32, max(1, share)), "at most: more at a time is no faster on a CPU")
        take("train.precision", "fp32", "many CPUs compute bf16 more slowly")
    else:
        take("train.micro_batch", "auto", "as many at a time as fit the GPU")
        precision = "bf16" if machine.bf16 else "fp32"
        take("train.precision", precision, f"this GPU {'has' if machine.bf16 else 'lacks'} bf16")
    updates = max(1, round(epochs * n / batch))
    take("train.log_every", max(1, min(50, updates // 20)), f"about {updates:,} updates in all")
    take("checkpoint.every_epochs", rounds, "at each evaluation, so that the best one is kept")
    if weights is not None:
        take("init.required", True, "a fine-tune")
        take("init.from", weights.path, "where it starts")
        same = f"{weights.shared} of {images.classes} classes have a row in the old head, by name"
        new = "the old head has none of these classes"
        take("init.head", "map" if weights.shared else "new", same if weights.shared else new)
        take("init.bias_table", "resize", "position tables follow model.img_size")
    return found


def _model(take: Any, images: Images, cpu: bool, weights: Weights | None) -> bool:
    """Choose the network; returns whether it is one of the small ones."""
    if weights is not None:
        name = take("model.name", weights.name, "the weights' own")
        take(
            "model.img_size", weights.img_size, "the weights' own; another one resizes their position tables"
        )
        if weights.overrides:
            take("model.overrides", dict(weights.overrides), "the weights' own")
    elif cpu:
        name = take("model.name", "dat_atto", "the smallest: minutes on a CPU")
        size = 32 if images.side <= 40 else 64
        take("model.img_size", size, f"images of about {images.side} px, on a CPU")
    else:
        name = take("model.name", "dat_tiny", "the paper's smallest, on a GPU")
        size = 224 if images.side > 96 else 96
        take("model.img_size", size, f"images of about {images.side} px")
    small = bool(name == "dat_atto")
    take("model.num_classes", images.classes, "the class folders")
    take("model.drop_path", 0.05 if small else 0.1, "little, for a small network" if small else "moderate")
    return small


def _augment(take: Any, n: int, cpu: bool, weights: Weights | None) -> None:
    if weights is None and not cpu and n >= 10_000:
        return  # the schema's defaults are the authors' recipe, for long trainings
    share = 0.5 if weights is not None else 0.35
    take("augment.crop_scale", (share, 1.0), "gentler than ImageNet's 0.08: the training is short")
    take("augment.hflip", 0.5, "0 where left and right tell classes apart, as in writing")
    take("augment.randaugment", "rand-m6-mstd0.5-inc1", "gentler than ImageNet's 9")
    for key, what in (("mixup", "mixing"), ("cutmix", "mixing"), ("erase_prob", "erasing")):
        take(f"augment.{key}", 0.0, f"{what} pays off in long trainings")
    if weights is not None:
        take("augment.interpolation", weights.interpolation, "the weights' own")
        take("augment.mean", weights.mean, "the weights' own")
        take("augment.std", weights.std, "the weights' own")


def _batch(n: int, machine: Machine) -> int:
    """A power of two for each device: an eighth of the images or less, 8 to 64 on a CPU, to 256 a GPU and 1,024 in all."""
    most = 64 if machine.device == "cpu" else min(1024, 256 * machine.devices)
    wanted = min(most, max(min(8, n), n // 8)) / machine.devices
    return machine.devices * (1 << max(0, int(wanted).bit_length() - 1))


def _epochs(n: int, cpu: bool, tuned: bool, small: bool) -> tuple[int, str]:
    """How often each image is seen, and the budget that it follows from."""
    budget, low, high = {
        (True, True): (10_000, 5, 30) if small else (3_000, 3, 10),
        (True, False): (20_000, 10, 100),
        (False, True): (100_000, 10, 50),
        (False, False): (1_000_000, 100, 300),
    }[cpu, tuned]
    return min(high, max(low, round(budget / n))), f"{budget:,} images seen, within {low} to {high} epochs"


def _round(value: float) -> float:
    """To two digits."""
    return float(round(value, 1 - int(log10(value) // 1)))
