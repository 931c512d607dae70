"""``dattrain bench step``: a whole update of a recipe, in turns with the same update changed in one setting; then taken apart.

An update is what a run does between two lines of ``metrics.jsonl``: mixing, forward, backward, clipping, AdamW and the average,
through the engine that trains (``engine.session``, DeepSpeed at the recipe's ZeRO stage). One process, so no communication;
images are random bytes made beforehand, so no data. Every contender sees the same batches, weights and drop-path noise.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dattrain.bench import common
from dattrain.bench.attention import pick_device
from dattrain.bench.step_parts import replaced, take_apart
from dattrain.errors import ConfigError, UserError

if TYPE_CHECKING:
    import torch

    from dattrain.config.schema import Config
    from dattrain.data.batch import Batch
    from dattrain.engine.session import Session

RECIPE = """
name: bench_step
model: {name: dat_tiny, drop_path: 0.2}
augment: {mixup: 0.8, cutmix: 1.0, erase_prob: 0.25, label_smoothing: 0.1}
optim: {weight_decay: 0.05, clip: 5.0}
train: {global_batch: 4, micro_batch: 4, precision: bf16, ema_decay: 0.9999}
zero: {stage: 2}
"""
"""What is measured where no recipe is named: the authors' ImageNet-1K settings at a micro-batch that suits a CPU."""
VARY = ("train.remat=none,selective,block,stage", "train.compile=none,block", "train.precision=fp32,bf16")
PROCESS_WIDE = ("train.deterministic", "train.tf32", "train.threads")
"""Settings that contenders which take turns in one process cannot have each for itself."""
BASELINE = "recipe"
BATCHES = 4
"""Different micro-batches that the updates run through."""
SETTLE = 20
"""Updates after which a loss scale must have found its level."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Recipe, what to vary, conditions, outputs."""
    parser.add_argument(
        "recipe",
        nargs="*",
        metavar="CONFIG key=value",
        help="a recipe or a run folder, and changes to it (dat_tiny at 224 px, micro-batch 4, bf16, ZeRO-2)",
    )
    parser.add_argument(
        "--vary",
        action="append",
        metavar="KEY=V,V",
        help=f"a setting and its values, one contender for each; repeat for more ({' '.join(VARY)})",
    )
    parser.add_argument(
        "--accumulation", type=common.positive, default=1, metavar="N", help="micro-batches of an update (1)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: the recipe's)")
    common.add_output_arguments(parser)
    parser.set_defaults(rounds=5)


def run(args: argparse.Namespace) -> int:
    """Measure, print, write; 0."""
    import torch

    from dattrain.runtime import environment

    config = read(args.recipe, args.accumulation)
    configs = {BASELINE: config, **variants(config, args.vary or VARY)}
    device = pick_device(args.device)
    environment.configure(
        threads=args.threads or config.train.threads,
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
            rounds=args.rounds,
            warmup=1,
            items=config.train.global_batch,
            extra={name: contender.facts for name, contender in contenders.items()},
            synchronize=wait,
        )
        parts = take_apart(contenders[BASELINE], args.rounds, wait)
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
    report = common.Report(
        f"An update of {config.model.name}",
        measurements,
        item="image",
        notes=notes,
        machine=common.describe_machine(str(device)),
        breakdowns=[common.Breakdown(f"Parts of an update ({BASELINE})", parts)],
    )
    common.emit(report, args)
    return 0


# What is compared --------------------------------------------------------------------------------------------------


def read(words: Sequence[str], accumulation: int) -> Config:
    """The recipe for one process and no data: its micro-batch, ``accumulation`` times an update; nothing to start from.

    Args:
        words: perhaps a recipe's or a run folder's path, then ``key=value``.

    Raises:
        ConfigError: as ``config.load.load``.
    """
    import yaml

    from dattrain.config.load import load, loads

    if words and ("=" not in words[0] or Path(words[0]).exists()):
        folder = Path(words[0])
        path = folder / "config.yaml" if (folder / "config.yaml").is_file() else folder
        config = load(path, words[1:]).config
    else:
        config = loads(RECIPE, words, source="the recipe of bench step").config
    tree = config.model_dump(mode="json", by_alias=True)
    tree["init"] = {}
    tree["train"] |= {"global_batch": config.train.micro_batch * accumulation, "progressive": []}
    return loads(yaml.safe_dump(tree)).config


def variants(config: Config, vary: Sequence[str]) -> dict[str, Config]:
    """``config`` with one setting changed, by ``key=value``; the values that it has already are left out.

    Args:
        vary: ``key=v1,v2``, the values scalars in YAML.

    Raises:
        ConfigError: unknown keys or values, settings of the whole process, or ones that change how many images an update has.
    """
    from dattrain.config.load import dump, flatten, loads

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
    m, t = config.model, config.train
    size = m.img_size if isinstance(m.img_size, int) else "x".join(map(str, m.img_size))
    more = [f"remat {t.remat}"] * (t.remat != "none") + [f"compile {t.compile}"] * (t.compile != "none")
    more += ["CUDA graphs"] * t.cuda_graphs
    batch = f"B{t.micro_batch}" + (
        f" x {t.global_batch // t.micro_batch}" if t.global_batch > t.micro_batch else ""
    )
    return " ".join([f"{size} px {batch} {t.precision} ZeRO-{config.zero.stage}", *more])


class Batches:
    """What the trainer's loader is to an update, from memory: ``BATCHES`` micro-batches over and over.

    Images are uniform bytes, labels uniform, plans drawn as for a run's first positions.
    """

    wait_s = 0.0

    def __init__(self, config: Config, device: torch.device) -> None:
        import torch

        from dattrain.data.augment.plan import draw
        from dattrain.data.batch import Batch
        from dattrain.engine.session import as_pair

        generator = torch.Generator().manual_seed(config.train.seed)
        height, width = as_pair(config.model.img_size)
        count = config.train.micro_batch
        self._batches: list[Batch] = []
        for number in range(BATCHES):
            pixels = torch.randint(256, (count, height, width, 3), generator=generator, dtype=torch.uint8)
            labels = torch.randint(config.model.num_classes, (count,), generator=generator)
            position = torch.arange(number * count, (number + 1) * count)
            plan = draw(config.augment, config.train.seed, position.numpy(), (height, width))
            names = [f"synthetic:{int(p)}" for p in position]
            batch = Batch(pixels.permute(0, 3, 1, 2), labels, torch.ones(count), position, names, plan)
            self._batches.append(batch.to(device))
        self._next = 0

    def __next__(self) -> Batch:
        self._next += 1
        return self._batches[(self._next - 1) % BATCHES]


class Contender:
    """A session and its batches; calling it runs one update as the trainer does."""

    def __init__(self, session: Session, batches: Batches, lr: float) -> None:
        self.session, self.batches, self.lr = session, batches, lr
        self.skipped = 0
        """Updates that were not applied."""
        self.facts: dict[str, float | str | None] = {}
        """More columns of the report."""

    def __call__(self) -> Any:
        update = self.session.updater(self.batches, self.lr)
        if not update.applied:
            self.skipped += 1
        elif self.session.ema is not None:
            self.session.ema.update()
        return update

    def close(self) -> None:
        """End the engine."""
        self.session.close()


def open_contender(name: str, config: Config, device: torch.device, notes: list[str]) -> Contender | None:
    """A contender that has run its first updates, its memory and first loss known; None, and a line in ``notes``, where the
    device's memory does not suffice.

    Raises:
        UserError: it does not suffice for the recipe itself, or no update of it is finite.
    """
    import torch

    from dattrain.config.derive import derive
    from dattrain.engine import compile as compiling
    from dattrain.engine.session import open_session

    derived = derive(config, world=1, samples_per_epoch=max(1_281_167, config.train.global_batch))
    cuda = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if cuda else 0
    begin = time.perf_counter()
    contender = None
    try:
        with heard(compiling.log) as lines:
            contender = Contender(
                open_session(config, derived, device, config.model.img_size),
                Batches(config, device),
                config.optim.lr,
            )
            update = contender()
            started, first = time.perf_counter() - begin, update.loss_sum / max(update.weight, 1.0)
            for _ in range(SETTLE):
                if update.applied:
                    break
                update = contender()
            contender.facts = {"first loss": f"{first:.4f}", "first update s": round(started, 1)}
            contender.facts |= memory(contender, before, device)
    except torch.OutOfMemoryError as error:
        if contender is not None:
            contender.close()
        if name == BASELINE:
            raise UserError(
                f"train.micro_batch={config.train.micro_batch} does not fit on {device}: {str(error).splitlines()[0]}"
            ) from None
        notes.append(f"{name}: out of memory, left out.")
        torch.cuda.empty_cache()
        return None
    notes += [f"{name}: {line}" for line in lines]
    if not update.applied:
        raise UserError(f"{name}: none of the first {SETTLE} updates was finite; there is nothing to measure")
    contender.skipped = 0
    return contender


@contextmanager
def heard(logger: logging.Logger) -> Iterator[list[str]]:
    """The warnings of ``logger`` inside the block, which then need no console."""
    lines: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    ear = Ear(logging.WARNING)
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(ear)
    try:
        yield lines
    finally:
        logger.removeHandler(ear)
        logger.propagate = propagate


# Memory ------------------------------------------------------------------------------------------------------------


def memory(contender: Contender, before: int, device: torch.device) -> dict[str, float | str | None]:
    """Of one more update. On CUDA: bytes at its peak, and what of them stands between updates (``before`` was there without
    the contender). Elsewhere: what autograd keeps of a micro-batch between forward and backward, weights left out.
    """
    import torch

    images = contender.session.engine.train_micro_batch_size_per_gpu()
    if device.type != "cuda":
        return {"MB kept/image": kept_bytes(contender) / images / 1e6}
    torch.cuda.reset_peak_memory_stats(device)
    contender()
    torch.cuda.synchronize(device)
    standing = torch.cuda.memory_allocated(device) - before
    peak = torch.cuda.max_memory_allocated(device) - before
    return {"GB peak": peak / 1e9, "GB between updates": standing / 1e9}


def kept_bytes(contender: Contender) -> int:
    """Bytes of the storages that autograd keeps for backward, each counted once, in one more update; weights left out."""
    import torch

    module = contender.session.engine.module
    updater = contender.session.updater
    kept: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        # Asked anew each time: under stage 3 weights have other storages in every forward pass.
        if all(storage.data_ptr() != own.untyped_storage().data_ptr() for own in module.parameters()):
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    def forward(batch: Batch) -> Any:
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            return plain(batch)

    plain = updater.forward
    with replaced(updater, forward=forward):
        contender()
    return sum(kept.values())
