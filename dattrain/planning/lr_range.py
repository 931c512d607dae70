"""A learning-rate range test (Smith 2015): updates at rates that grow exponentially, and where the loss falls fastest.

The updates are the trainer's own (``engine.session``, ``engine.step``): the recipe's data, augmentation, global batch, optimizer,
precision and ZeRO stage, from the weights that a run would start from. Only the schedule is replaced. One process.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from dattrain.config.derive import check_source, derive
from dattrain.config.schema import Config
from dattrain.engine import micro_batch
from dattrain.engine.session import open_session
from dattrain.engine.step import seed_all
from dattrain.errors import ConfigError
from dattrain.runtime import environment
from dattrain.tasks.create import create_task

DIVERGED = 4.0
"""The test ends where the mean of the last losses is so many times the lowest such mean."""
WINDOW = 5
"""Updates of that mean."""
FALL = 0.02
"""A loss that has not fallen by this share of its first value tells nothing."""


@dataclass(frozen=True)
class RangeTest:
    """What the updates showed; the lists have one entry per update."""

    rates: list[float]
    losses: list[float]
    """Means over the global batch, before the update at that rate."""
    diverged: bool
    """Whether it ended before the last rate."""


@dataclass(frozen=True)
class Suggestion:
    """Rates of the global batch, read off the smoothed curve."""

    steepest: float
    """Where the loss falls fastest against the logarithm of the rate: the rate to use."""
    lowest: float
    """Where the loss is lowest; the rate to use lies well below it."""


def rates(low: float, high: float, updates: int) -> list[float]:
    """``updates`` rates from ``low`` to ``high``, each the one before times a constant.

    Raises:
        ConfigError: they do not grow, or are too few for a curve.
    """
    if not 0 < low < high or not math.isfinite(high):
        raise ConfigError(f"--min {low:g} --max {high:g}: rates grow from a positive one to a greater one")
    if updates < 10:
        raise ConfigError(f"--updates {updates}: at least 10, for there to be a curve")
    return [float(rate) for rate in np.geomspace(low, high, updates)]


def run(
    config: Config,
    over: Sequence[float],
    *,
    environ: Mapping[str, str],
    say: Callable[[int, float, float], None] = lambda update, rate, loss: None,
) -> RangeTest:
    """Train at the rates ``over``, one update each, until the loss diverges. Leaves no file.

    Args:
        environ: variables of the process.
        say: called after each update with its number from 1, its rate and its loss.

    Raises:
        ConfigError: the process is one of several ranks, or as for a training.
        UserError: as for a training.
    """
    env = environment.resolve(environ)
    if env.world > 1:
        raise ConfigError(f"lr-find runs in one process, and this is one of {env.world}")
    check_source(config)
    settings = config.train
    # An average would be kept for nothing, and the image does not grow within the test.
    config = config.model_copy(
        update={"train": settings.model_copy(update={"ema_decay": 0.0, "progressive": ()})}
    )
    environment.configure(
        threads=settings.threads, deterministic=settings.deterministic, tf32=settings.tf32, env=env
    )
    device = environment.pick_device(env)
    losses: list[float] = []
    with ExitStack() as stack:
        stack.enter_context(environment.process_group(env, device))
        config = micro_batch.settle(config, env.world, device, env.local_world)
        task, size = create_task(config), config.model.img_size
        loader = task.train_loader(rank=0, world=1, samples_seen=0, device=device, img_size=size)
        stack.callback(loader.close)
        derived = derive(config, world=1, samples_per_epoch=loader.samples_per_epoch)
        session = open_session(config, derived, device, size, task=task, classes=loader.classes)
        stack.callback(session.close)
        for number, rate in enumerate(over):
            seed_all(settings.seed, number * settings.global_batch, 0)
            update = session.train_step(loader, rate)
            loss = update.loss_sum / max(update.weight, 1.0)
            if not math.isfinite(loss):
                return RangeTest(list(over[:number]), losses, True)
            losses.append(loss)
            say(number + 1, rate, loss)
            if diverged(losses):
                return RangeTest(list(over[: number + 1]), losses, True)
    return RangeTest(list(over), losses, False)


def diverged(losses: Sequence[float]) -> bool:
    """Whether the loss has left its valley for good."""
    if len(losses) < 2 * WINDOW:
        return False
    means = np.convolve(losses, np.full(WINDOW, 1 / WINDOW), "valid")
    return bool(means[-1] > DIVERGED * means.min())


def smooth(losses: Sequence[float]) -> list[float]:
    """Losses averaged with their neighbours on both sides (a Gaussian of a 25th of the curve): no lag, as a running mean has."""
    values = np.asarray(losses, dtype=float)
    places = np.arange(len(values))
    width = max(1.0, len(values) / 25)
    weights = np.exp(-0.5 * ((places[:, None] - places[None, :]) / width) ** 2)
    return [float(value) for value in weights @ values / weights.sum(axis=1)]


def suggest(found: RangeTest) -> Suggestion | None:
    """Rates to use; None where the loss has not fallen, so that nothing can be said."""
    curve = np.asarray(smooth(found.losses))
    if len(curve) < 3:
        return None
    lowest = int(curve.argmin())
    # Not the very first losses: of a loss that only rises, the lowest is the first.
    if lowest < 2 or curve[: lowest + 1].max() - curve[lowest] < FALL * abs(curve[0]):
        return None
    slope = np.gradient(curve, np.log(found.rates))
    return Suggestion(found.rates[int(slope[: lowest + 1].argmin())], found.rates[lowest])


def write(folder: Path, config: Config, found: RangeTest, suggested: Suggestion | None) -> tuple[Path, Path]:
    """Write ``lr_find.json`` and ``lr_find.png``; returns their paths."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    curve = smooth(found.losses)
    content = {
        "recipe": config.name,
        "global_batch": config.train.global_batch,
        "lr_batch": config.optim.lr_batch,
        **asdict(found),
        "smoothed": curve,
        "suggestion": None if suggested is None else asdict(suggested),
        "optim.lr": None if suggested is None else stated(config, suggested.steepest),
    }
    data, picture = folder / "lr_find.json", folder / "lr_find.png"
    data.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.semilogx(found.rates, found.losses, color="0.75", linewidth=1, label="loss of each update")
    axes.semilogx(found.rates, curve, label="smoothed")
    if suggested is not None:
        axes.axvline(suggested.steepest, linestyle="--", color="tab:red", label=f"{suggested.steepest:.2g}")
    axes.set_ylim(min(found.losses) * 0.95, ceiling(curve))
    axes.set_xlabel(f"learning rate at a batch of {config.train.global_batch}")
    axes.set_ylabel("training loss")
    axes.set_title(f"Learning-rate range test of {config.name}", parse_math=False)
    axes.legend()
    figure.savefig(picture, dpi=120)
    return data, picture


def stated(config: Config, rate: float) -> float:
    """``optim.lr``, which is stated at ``optim.lr_batch``, for ``rate`` at the global batch."""
    return rate * config.optim.lr_batch / config.train.global_batch


def ceiling(curve: Sequence[float]) -> float:
    """The highest loss that is drawn: one on its way to infinity would leave nothing of the valley."""
    return min(max(curve), 1.3 * curve[0])


def bars(curve: Sequence[float]) -> str:
    """A smoothed curve as a line of bars."""
    low, high = min(curve), ceiling(curve)
    marks = "▁▂▃▄▅▆▇█"
    shares = ((min(value, high) - low) / (high - low or 1) for value in curve)
    return "".join(marks[round(share * (len(marks) - 1))] for share in shares)


def device_name(environ: Mapping[str, str]) -> str:
    """The device that ``run`` takes."""
    device: torch.device = environment.pick_device(environment.resolve(environ))
    return environment.device_name(device)
