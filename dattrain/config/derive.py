"""What follows from a recipe, a world size and a data set: computed and shown, never written back.

Pure, but that ``check_source`` looks whether a file is there.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from pathlib import Path

from dattrain.config.run import split_checkpoint
from dattrain.config.schema import Config
from dattrain.errors import ConfigError, UserError


@dataclass(frozen=True)
class Derived:
    """Derived values; steps are optimizer updates, rates are those of the global batch."""

    world: int
    accumulation: int
    """Micro-batches per rank and update."""
    steps_per_epoch: float
    total_steps: int
    """Length of the schedule; ``train.max_steps`` may stop earlier."""
    last_step: int
    """The update after which the run is done."""
    warmup_steps: int
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


def accumulation(config: Config, world: int) -> int:
    """Micro-batches per rank and update: ``train.global_batch`` over the ranks, ``train.micro_batch`` at a time.

    Raises:
        ConfigError: it does not divide; the nearest micro-batch that does is named.
    """
    train = config.train
    if train.global_batch % (train.micro_batch * world):
        fits = [m for m in range(1, train.global_batch + 1) if train.global_batch % (m * world) == 0]
        if not fits:
            raise ConfigError(
                f"train.global_batch={train.global_batch} cannot be split over {world} devices; "
                f"use a number of devices that divides it"
            )
        best = min(fits, key=lambda m: (abs(m - train.micro_batch), m))
        raise ConfigError(
            f"train.micro_batch={train.micro_batch} on {world} devices does not divide train.global_batch="
            f"{train.global_batch}; train.micro_batch={best} does"
        )
    return train.global_batch // (train.micro_batch * world)


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
        ConfigError: the micro-batch times the world size does not divide the global batch, or there are fewer samples
            than one global batch.
    """
    train, schedule, optim = config.train, config.schedule, config.optim
    micro_batches = accumulation(config, world)
    check_samples(config, samples_per_epoch)
    scale = train.global_batch / optim.lr_batch
    per_epoch = samples_per_epoch / train.global_batch
    total = ceil(schedule.epochs * per_epoch)
    save = config.checkpoint.every_steps or max(1, round(config.checkpoint.every_epochs * per_epoch))
    return Derived(
        world=world,
        accumulation=micro_batches,
        steps_per_epoch=per_epoch,
        total_steps=total,
        last_step=min(total, train.max_steps or total),
        warmup_steps=round(schedule.warmup_epochs * per_epoch),
        peak_lr=optim.lr * scale,
        min_lr=schedule.min_lr * scale,
        warmup_lr=schedule.warmup_lr * scale,
        checkpoint_steps=save,
        eval_steps=max(1, round(config.eval.every_epochs * per_epoch)),
    )
