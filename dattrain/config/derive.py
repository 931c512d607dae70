"""What follows from a recipe, a world size and a data set: computed and shown, never written back.

Pure, but that ``check_source`` looks whether a file is there.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, isqrt
from pathlib import Path

from dattrain.config.run import split_checkpoint
from dattrain.config.schema import Config
from dattrain.errors import ConfigError, UserError

FAST_DEV_STEPS = 2
"""Updates of ``train.fast_dev_run``."""
SAMPLES = {
    "imagenet-1k": 1_281_167,
    "imagenet-12k": 12_129_687,
    "imagenet-22k": 14_197_122,
    "imagenet-22k-winter21": 13_151_276,
    "imagenet-21k-p": 11_060_223,
}
"""Training images of the label sets, as their makers state them."""


@dataclass(frozen=True)
class Derived:
    """Derived values; steps are optimizer updates, rates are those of the global batch."""

    world: int
    micro_batch: int
    """Samples per device and forward pass, at most ``train.micro_batch``."""
    accumulation: int
    """Micro-batches per rank and update."""
    steps_per_epoch: float
    total_steps: int
    """Length of the schedule; ``train.max_steps`` may stop earlier."""
    last_step: int
    """The update after which the run is done."""
    warmup_steps: int
    milestones: tuple[int, ...]
    """Updates at which ``schedule.kind=step`` multiplies the rate."""
    peak_lr: float
    min_lr: float
    warmup_lr: float
    checkpoint_steps: int
    """Updates between two checkpoints."""
    eval_steps: int
    """Updates between two evaluations."""


def check_source(config: Config, *, waits: bool = False) -> None:
    """Refuse a fine-tune that starts from nowhere; for a run without checkpoints.

    It would train a random network in silence, or end where its job starts.

    What makes a recipe a fine-tune: ``init.required``, a head that is made from the source's (``init.head``), or a backbone that
    is not trained.

    Args:
        waits: for a job that may write what ``init.from`` names, so that it need not be there yet.

    Raises:
        ConfigError: ``init.from`` is not set.
        UserError: it names nothing that is there, or a file that is no safetensors.
    """
    init = config.init
    marks = {
        "init.required=true": init.required,
        f"init.head={init.head}": init.head != "keep",
        "optim.freeze_backbone=true": config.optim.freeze_backbone,
    }
    if not init.from_ and any(marks.values()):
        why = next(mark for mark, there in marks.items() if there)
        raise ConfigError(
            f"{config.name} is a fine-tune ({why}), but init.from is not set, and a random network would be trained: add "
            "init.from=RUN_OR_WEIGHTS, for example init.from=runs/pretrained or init.from=weights.safetensors"
        )
    if init.from_ and not waits:
        _check_there(Path(init.from_))


def check_early_stopping(config: Config) -> None:
    """Refuse early stopping without the evaluations that it looks at.

    Raises:
        ConfigError: ``data.val`` is not set, or ``checkpoint.metric`` is of averages that are not evaluated.
    """
    train, metric = config.train, config.checkpoint.metric
    if train.early_stopping_patience is None:
        return
    here = f"train.early_stopping_patience={train.early_stopping_patience}"
    if config.data.val is None:
        raise ConfigError(f"{here} looks at evaluations during training, but data.val is not set")
    if metric.startswith("ema_") and not (train.ema_decay > 0 and config.eval.ema):
        raise ConfigError(
            f"{here} looks at checkpoint.metric={metric}, but no averages are evaluated: set train.ema_decay and eval.ema, or "
            f"checkpoint.metric={metric.removeprefix('ema_')}"
        )


def _check_there(path: Path) -> None:
    run, which = split_checkpoint(path)
    if path.is_dir() or (which is not None and run.is_dir()):
        return
    try:
        with open(path, "rb") as file:
            head = file.read(9)
    except FileNotFoundError:
        raise UserError(
            f"init.from={path}: no such run folder, checkpoint or file (from {Path.cwd()})"
        ) from None
    except OSError as error:
        raise UserError(f"init.from={path}: cannot be read ({error.strerror})") from None
    if head[8:] != b"{":  # eight bytes of length, then JSON
        raise UserError(
            f"init.from={path} is not a safetensors file; `dattrain import` reads the authors' pickles"
        )


def micro_batch(config: Config, world: int) -> int:
    """Samples per device and forward pass: the largest number up to ``train.micro_batch`` that divides a rank's share.

    ``auto`` gives the whole share; whoever trains has asked ``dattrain.engine.micro_batch`` before, which gives a number.

    Raises:
        ConfigError: the global batch does not divide over the devices, or no such number holds whole mix groups where the
            reader cannot fetch partners.
    """
    train = config.train
    share, rest = divmod(train.global_batch, world)
    if rest:
        near = [n for n in (world - 1, world + 1) if n > 0 and train.global_batch % n == 0]
        raise ConfigError(
            f"train.global_batch={train.global_batch} cannot be split over {world} devices; use a number of devices that "
            f"divides it{f' ({near[0]})' if near else ''}, or train.global_batch={max(1, train.global_batch // world) * world}"
        )
    most = share if train.micro_batch == "auto" else train.micro_batch
    # Other readers find a sample's partner, wherever it is.
    group = config.augment.group if config.data.reader == "webdataset" else 1
    fits = [size for size in divisors(share) if size <= most and size % group == 0]
    if not fits:
        raise ConfigError(
            f"train.micro_batch={train.micro_batch} on {world} devices leaves no number that divides {share} samples a device "
            f"into whole groups of augment.mix_group={group}, and data.reader={config.data.reader} cannot read a partner that "
            "is elsewhere; use data.reader=index, another micro-batch or group, or augment.mix_prob=0"
        )
    return fits[-1]


def with_micro_batch(config: Config, size: int) -> Config:
    """The recipe with ``train.micro_batch`` as it was found for a world."""
    return config.model_copy(update={"train": config.train.model_copy(update={"micro_batch": size})})


def divisors(number: int) -> list[int]:
    """All of them, ascending."""
    low = [d for d in range(1, isqrt(number) + 1) if number % d == 0]
    return sorted({*low, *(number // d for d in low)})


def accumulation(config: Config, world: int) -> int:
    """Micro-batches per rank and update; raises as ``micro_batch``."""
    return config.train.global_batch // (micro_batch(config, world) * world)


def check_samples(config: Config, samples: int) -> None:
    """Raises ConfigError where the training set has fewer samples than one global batch."""
    if samples < config.train.global_batch:
        raise ConfigError(
            f"data.train={config.data.train} has {samples} samples, fewer than one "
            f"train.global_batch={config.train.global_batch}; use more data or a smaller global batch"
        )


def derive(config: Config, *, world: int, samples_per_epoch: int) -> Derived:
    """Derive steps, accumulation and rates for ``world`` devices and ``samples_per_epoch`` training samples.

    Raises:
        ConfigError: the global batch does not divide over the devices, or there are fewer samples than it has.
    """
    train, schedule, optim = config.train, config.schedule, config.optim
    micro_batches = accumulation(config, world)
    check_samples(config, samples_per_epoch)
    scale = train.global_batch / optim.lr_batch
    per_epoch = samples_per_epoch / train.global_batch
    total = schedule.updates or ceil(schedule.epochs * per_epoch)
    warmup = schedule.warmup_updates
    unit = per_epoch if schedule.updates is None else 1.0
    save = config.checkpoint.every_steps or max(1, round(config.checkpoint.every_epochs * per_epoch))
    evaluate = config.eval.every_steps or max(1, round(config.eval.every_epochs * per_epoch))
    last = min(total, train.max_steps or total)
    if train.fast_dev_run:
        # Whatever their intervals, both come after the last update.
        last = save = evaluate = min(last, FAST_DEV_STEPS)
    return Derived(
        world=world,
        micro_batch=micro_batch(config, world),
        accumulation=micro_batches,
        steps_per_epoch=per_epoch,
        total_steps=total,
        last_step=last,
        warmup_steps=round(schedule.warmup_epochs * per_epoch) if warmup is None else warmup,
        milestones=tuple(round(each * unit) for each in schedule.milestones),
        peak_lr=optim.lr * scale,
        min_lr=schedule.min_lr * scale,
        warmup_lr=schedule.warmup_lr * scale,
        checkpoint_steps=save,
        eval_steps=evaluate,
    )
