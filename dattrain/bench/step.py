"""A whole update of a recipe, in turns with the same update changed in one setting; then taken apart.

An update is what a run does between two lines of ``metrics.jsonl``: mixing, forward, backward, clipping, AdamW and the average,
through the engine that trains (``engine.session``, DeepSpeed at the recipe's ZeRO stage). One process, so no communication;
images are random bytes made beforehand, so no data. Every contender sees the same batches, weights and drop-path noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
import yaml

from dattrain.bench import common
from dattrain.bench.contender import BASELINE, Contender, open_contender
from dattrain.bench.defaults import VARY
from dattrain.bench.step_parts import take_apart
from dattrain.config.load import dump, flatten, load, loads
from dattrain.config.schema import Config
from dattrain.engine.micro_batch import shown
from dattrain.errors import ConfigError
from dattrain.runtime import environment

RECIPE = """
name: bench_step
model: {name: dat_tiny, drop_path: 0.2}
augment: {mixup: 0.8, cutmix: 1.0, erase_prob: 0.25, label_smoothing: 0.1}
optim: {weight_decay: 0.05, clip: 5.0}
train: {global_batch: 4, micro_batch: 4, precision: bf16, ema_decay: 0.9999}
zero: {stage: 2}
"""
"""What is measured where no recipe is named: the authors' ImageNet-1K settings at a micro-batch that suits a CPU."""
PROCESS_WIDE = ("train.deterministic", "train.tf32", "train.threads")
"""Settings that contenders which take turns in one process cannot have each for itself."""


def bench(
    config: Config, vary: Sequence[str], *, device: torch.device, rounds: int, threads: int = 0
) -> common.BenchReport:
    """Time the recipe's update and its variants in turns, then the parts of the recipe's.

    Args:
        config: as ``read`` gives it.
        vary: ``key=v1,v2``, as ``variants`` takes them.
        device: where.
        rounds: turns of each contender.
        threads: CPU threads; 0 takes the recipe's.

    Raises:
        ConfigError: as ``variants``.
        UserError: the recipe's own update does not fit on the device, or none of its updates is finite.
    """
    configs = {BASELINE: config, **variants(config, vary)}
    environment.configure(
        threads=threads or config.train.threads,
        deterministic=config.train.deterministic,
        tf32=config.train.tf32,
    )
    wait = torch.cuda.synchronize if device.type == "cuda" else None
    notes: list[str] = []
    with ExitStack() as stack:
        stack.enter_context(environment.process_group(environment.resolve({}), device))
        contenders: dict[str, Contender] = {}
        for name, each in configs.items():
            contender = open_contender(name, each, device, notes)
            if contender is not None:
                contenders[name] = contender
                stack.callback(contender.close)
        measurements = common.compare(
            describe(config),
            contenders,
            baseline=BASELINE,
            rounds=rounds,
            warmup=1,
            items=config.train.global_batch,
            extra={name: contender.facts for name, contender in contenders.items()},
            synchronize=wait,
        )
        parts = take_apart(contenders[BASELINE].session, contenders[BASELINE], rounds, wait)
    notes += [
        f"{name}: {c.skipped} updates were not finite, so that their AdamW was skipped: read its ratio with care"
        for name, c in contenders.items()
        if c.skipped
    ]
    if device.type == "cuda":
        notes.append(
            "For the parts alone the device is waited for at each border, so they overlap less than they do in a run."
        )
    notes.append("One process: nothing is communicated. Reading and decoding: `dattrain bench data`.")
    return common.BenchReport(
        f"An update of {config.model.name}",
        measurements,
        item="image",
        notes=notes,
        machine=common.describe_machine(str(device)),
        breakdowns=[common.Breakdown(f"Parts of an update ({BASELINE})", parts)],
    )


def read(words: Sequence[str], accumulation: int) -> Config:
    """The recipe for one process and no data: its micro-batch, ``accumulation`` times an update; nothing to start from.

    Args:
        words: perhaps a recipe's or a run folder's path, then ``key=value``.

    Raises:
        ConfigError: as ``config.load.load``.
    """
    # The recipe's own global batch is no matter here, and need not be a multiple of the micro-batch that is asked for.
    sizes = [word.partition("=")[2] for word in words if word.startswith("train.micro_batch=")]
    words = [*words, *(f"train.global_batch={size}" for size in sizes[-1:] if size.isdecimal())]
    if words and ("=" not in words[0] or Path(words[0]).exists()):
        config = load(words[0], words[1:]).config
    else:
        config = loads(RECIPE, words, source="the recipe of bench step").config
    tree = config.model_dump(mode="json", by_alias=True)
    tree["init"] = {}
    tree["train"] |= {"global_batch": config.train.samples_a_pass * accumulation, "progressive": []}
    return loads(yaml.safe_dump(tree)).config


def variants(config: Config, vary: Sequence[str]) -> dict[str, Config]:
    """``config`` with one setting changed, by ``key=value``; the values that it has already are left out.

    Args:
        vary: ``key=v1,v2``, the values scalars in YAML.

    Raises:
        ConfigError: unknown keys or values, settings of the whole process, or ones that change how many images an update has.
    """
    text, found = dump(config), {}
    for given in vary:
        key, sign, values = given.partition("=")
        if not sign or not values:
            raise ConfigError(f"--vary {given}: say KEY=VALUE,VALUE, e.g. {VARY[0]}")
        if key in PROCESS_WIDE:
            raise ConfigError(
                f"--vary {given}: {key} holds for the whole process; run the bench twice, with {key}=... in its recipe"
            )
        for value in values.split(","):
            changed = loads(text, [f"{key}={value}"]).config
            if changed.train.global_batch != config.train.global_batch:
                raise ConfigError(
                    f"--vary {given}: an update would have other images; vary train.micro_batch, or run the bench twice"
                )
            if flatten(changed) != flatten(config):
                found[f"{key}={value}"] = changed
    return found


def describe(config: Config) -> str:
    """The conditions of ``config`` as a case's name."""
    t = config.train
    found = shown(config, config.model.img_size)
    size = found if isinstance(found, int) else "x".join(map(str, found))
    recomputed = t.activation_checkpointing
    more = [f"activation checkpointing {recomputed}"] * (recomputed != "none")
    more += [f"compile {t.compile}"] * (t.compile != "none")
    more += ["CUDA graphs"] * t.cuda_graphs
    count = t.samples_a_pass
    batch = f"B{count}" + (f" x {t.global_batch // count}" if t.global_batch > count else "")
    return " ".join([f"{size} px {batch} {t.precision} ZeRO-{config.zero.stage}", *more])
