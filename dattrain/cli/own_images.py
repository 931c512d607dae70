"""A training of one's own images: look at the folder, have the settings chosen, say them on one screen, write them down.

``train --data``, ``finetune`` and ``init`` share this; what is chosen, and why, is ``config.choose``.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from dattrain.cli.loading import loading
from dattrain.errors import ConfigError, UserError

if TYPE_CHECKING:
    from dattrain.config.choose import Machine
    from dattrain.config.schema import Config
    from dattrain.data.prepare.own_images import Own
    from dattrain.pretrained.start_from import Start

SMALL_CLASS = 10
"""Images of a class below which it is said."""
IMBALANCE = 10
"""Times the smallest class that the largest has, from which on it is said."""
ON_COMMAND_LINE = "given on the command line"


@dataclass(frozen=True)
class Settled:
    """The settings of a training of own images."""

    config: Config
    reasons: Mapping[str, str]
    """Why a value is what it is, by dotted key."""


def add_data_argument(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    """``--data``."""
    parser.add_argument(
        "--data",
        type=Path,
        required=required,
        metavar="FOLDER",
        help="images: train/ and val/, or a folder for each class, of which a tenth is held out; settings are chosen for them",
    )


def take_words(args: argparse.Namespace) -> None:
    """Tell an override from the recipe, which may be left out."""
    word = args.config
    if word is not None and re.fullmatch(r"[A-Za-z_][\w.]*=.*", word, re.DOTALL) and not Path(word).exists():
        args.config, args.overrides = None, [word, *args.overrides]


def begin(args: argparse.Namespace, weights: str | None = None) -> Path:
    """Set up the run folder of a training of ``args.data``, and say what will be trained; an existing one is left as it is.

    Afterwards ``args`` is a training of that folder: ``config``, ``overrides``.

    Raises:
        ConfigError: ranks that were started already, settings that do not fit, or a run folder of other images.
        UserError: images or weights that cannot be used.
    """
    with loading("torch", always=True):
        from dattrain.config.load import dump, given
        from dattrain.config.run import is_rank, new_folder
        from dattrain.data.prepare.own_images import find
        from dattrain.engine import resume_rules
        from dattrain.files import write_text
        from dattrain.pretrained.start_from import Start

    take_words(args)
    if args.run_dir is not None and (args.run_dir / "config.yaml").is_file():
        _check_same(args.run_dir, args.data)
        print(f"{args.run_dir}: is there already; its config.yaml holds, and nothing is chosen anew")
        args.config = str(args.run_dir)
        return Path(args.run_dir)
    if is_rank(os.environ):
        raise ConfigError(
            "--data chooses for this machine, and torchrun or srun has started ranks: use --nproc N instead, or let "
            f"`dattrain init --data {args.data}` write a recipe, which any launcher takes"
        )
    if args.config is not None and (Path(args.config) / "config.yaml").is_file():
        raise ConfigError(
            f"{args.config} is a run, which has its images: `dattrain train {args.config}` goes on with it, and `dattrain finetune "
            f"{args.config} --data {args.data}` trains its weights on others"
        )
    if args.nproc is not None and args.nproc < 1:
        raise ConfigError(f"--nproc {args.nproc} must be at least 1")
    asked = given(args.overrides)
    own = find(args.data, seed=_seed(args.config, asked))
    start = None if weights is None else Start(weights)
    machine = this_machine(args.nproc or 1)
    name = name_of(args.data, start)
    # Its name is known before its settings are, which name its files.
    folder = args.run_dir or new_folder(str(asked.get("name", name)), os.environ)
    resume_rules.check_folder(folder)
    settled = settle(
        own, folder, machine, name=name, recipe=args.config, overrides=args.overrides, start=start
    )
    print("\n".join(screen(own, settled.config, machine, folder, args.data, start)), flush=True)
    write_beside(own, folder, start)
    try:
        write_text(folder / "config.yaml", dump(settled.config, settled.reasons))
    except OSError as error:
        raise UserError(f"{folder}: the run folder cannot be written: {error.strerror or error}") from error
    args.config, args.overrides = str(folder), []
    return Path(folder)


def settle(
    own: Own,
    folder: Path,
    machine: Machine,
    *,
    name: str,
    recipe: str | None = None,
    overrides: Sequence[str] = (),
    start: Start | None = None,
    asked: Mapping[str, Any] | None = None,
) -> Settled:
    """Choose what nobody has said; a recipe's values stand, but for data, classes and what a fine-tune starts from.

    Args:
        folder: where ``write`` will put what the settings name.
        asked: more that is given, as ``overrides``.

    Raises:
        ConfigError: settings that do not fit each other, the images or the devices.
        UserError: images that cannot be read.
    """
    import yaml

    from dattrain.config.choose import GIVEN, Choice, Images, choose
    from dattrain.config.derive import derive
    from dattrain.config.load import dump, given, load, loads
    from dattrain.data.classes import decide

    asked = {**(asked or {}), **given(overrides)}
    classes = list(own.train)
    train, val = splits(own, folder)
    held = "a tenth of each class, held out" if own.held_out else "the folder beside it"
    found = {
        "data.train": Choice(train, "the images"),
        "data.val": Choice(val, held),
        "model.num_classes": Choice(len(classes), "the class folders"),
    }
    weights = None if start is None else start.weights(folder, classes)
    count = sum(map(len, own.train.values()))
    images = Images(count, sum(map(len, own.val.values())), len(classes), own.side)
    chosen = choose(images, machine, weights, _usable(asked))
    if recipe is None:
        found = {"name": Choice(name, "the folder"), **found, **chosen}
        text = yaml.safe_dump(nested({key: choice.value for key, choice in found.items()}), sort_keys=False)
    else:
        base = load(recipe).config
        if base.data.labels is not None:
            if _all_in(classes, base.data.labels, base.model.num_classes):
                del found["model.num_classes"]
            else:
                found["data.labels"] = Choice(None, "the class folders are of no label set")
        if weights is not None:
            # What the weights are is no choice; the recipe's head stands where it can.
            head = base.init.head == "keep" or not weights.shared
            open_ = {"init.from", *(["init.head"] if head else ())}
            open_ |= set() if base.model.overrides else {"model.overrides"}
            found |= {key: choice for key, choice in chosen.items() if key in open_}
        text = dump(load(recipe, {key: choice.value for key, choice in found.items()}).config)
    loaded = loads(text, overrides, source="what was chosen")
    config = loaded.config
    if weights is not None and config.model.name != weights.name:
        raise ConfigError(
            f"model.name={config.model.name}, but {weights.path} has weights of {weights.name}; use a recipe of that model, or none"
        )
    reasons = {key: ON_COMMAND_LINE if c.reason == GIVEN else c.reason for key, c in found.items()}
    reasons |= dict.fromkeys(given(overrides), ON_COMMAND_LINE)
    # What messages name is there, and no list yet.
    named = config.model_copy(update={"data": config.data.model_copy(update={"train": str(own.train_root)})})
    decide(classes, config.model.num_classes, config.data.labels, f"data.train={own.train_root}")
    derive(named, world=machine.devices, samples_per_epoch=count)
    if own.unreadable and config.data.on_bad == "error":
        raise UserError(
            f"{len(own.unreadable)} of {len(own.widths) + len(own.unreadable)} files that were looked at are no readable images: "
            f"{'; '.join(own.unreadable[:3])}. Remove them, or train with data.on_bad=skip, which leaves them out and counts them"
        )
    return Settled(config, reasons)


def splits(own: Own, folder: Path) -> tuple[str, str]:
    """What ``data.train`` and ``data.val`` are to name."""
    if not own.held_out:
        return str(own.train_root), str(own.val_root)
    from dattrain.data.source.split_file import SUFFIX

    base = folder.absolute()
    return str(base / f"train{SUFFIX}"), str(base / f"val{SUFFIX}")


def write_beside(own: Own, folder: Path, start: Start | None) -> None:
    """Write what the settings name: the lists of what is held out and what is not, and the authors' weights in our names.

    Raises:
        UserError: the folder cannot be written.
    """
    from dattrain.data.source import split_file

    try:
        folder.mkdir(parents=True, exist_ok=True)
        if own.held_out:
            for path, files in zip(splits(own, folder), (own.train, own.val)):
                split_file.write(Path(path), own.train_root, files)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from error
    if start is not None:
        start.write(folder)


def screen(
    own: Own, config: Config, machine: Machine, folder: Path, data: Path, start: Start | None
) -> list[str]:
    """What was found and what will be trained, in lines."""
    import torch

    from dattrain.config.derive import derive
    from dattrain.engine.memory import checkpoint_bytes
    from dattrain.models.flops import parameters
    from dattrain.tasks.create import create_task

    train, val = ({name: len(files) for name, files in part.items()} for part in (own.train, own.val))
    n, held = sum(train.values()), sum(val.values())
    d = derive(config, world=machine.devices, samples_per_epoch=n)
    with torch.device("meta"):
        weights = parameters(create_task(config).build(config.model.img_size))
    size = checkpoint_bytes(weights, ema=config.train.ema_decay > 0) / 1e6
    kept = config.checkpoint.keep_last + config.checkpoint.keep_best
    how = f"held out: a tenth of each class, seed {config.train.seed}" if own.held_out else str(own.val_root)
    source = "from nothing" if start is None else f"from {start.said}; head: {config.init.head}"
    at_a_time = "as many as fit" if config.train.micro_batch == "auto" else f"{d.micro_batch} at a time"
    passes = "" if config.train.micro_batch == "auto" else f", {d.accumulation} accumulated"
    rows = [
        ("images", f"{n:,} to train on, {held:,} to evaluate on ({how})"),
        ("classes", f"{len(train)}: {_counts(train)}"),
        ("sizes", _sizes(own)),
        *(("note", note) for note in [*own.notes, *_warnings(train)]),
        ("model", f"{config.model.name} at {_pixels(config.model.img_size)}, {weights / 1e6:.2f} M parameters, {source}"),
        (
            "batch",
            f"{config.train.global_batch} ({machine.devices} device(s), {at_a_time}{passes}); {config.schedule.length} of "
            f"{d.steps_per_epoch:.1f} updates, {d.last_step:,} in all",
        ),
        ("rate", f"peak {d.peak_lr:.3g} after {d.warmup_steps} updates, {config.schedule.kind} to {d.min_lr:.3g}"),
        ("device", f"{_device(machine)}, {config.train.precision}"),
        ("run", f"{folder}; a checkpoint has {size:,.0f} MB, up to {kept} are kept"),
        ("why", f"each value has its reason in {folder}/config.yaml (`dattrain config show {quote(str(folder))}`)"),
    ]  # fmt: skip
    if start is None and n < _few():
        rows.append(
            (
                "note",
                f"{n:,} images are few to learn from nothing: a fine-tune is far better, `dattrain finetune WEIGHTS --data {quote(str(data))}` "
                "(the authors' weights: github.com/LeapLabTHU/DAT)",
            )
        )
    return [f"{name:<9}{text}" for name, text in rows]


def this_machine(devices: int) -> Machine:
    """What ``config.choose`` is told of this machine."""
    import torch

    from dattrain.config.choose import Machine

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not torch.cuda.is_available():
        return Machine("cpu", devices, cores)
    if devices > torch.cuda.device_count():
        raise ConfigError(f"--nproc {devices}, but {torch.cuda.device_count()} GPU(s) are visible")
    return Machine("cuda", devices, cores, torch.cuda.is_bf16_supported())


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Sections of dotted keys, in the schema's order, with lists where there are tuples."""
    from dattrain.config.schema import Config

    found: dict[str, Any] = {name: {} for name in Config.model_fields}
    for key, value in values.items():
        section, _, name = key.partition(".")
        plain = list(value) if isinstance(value, tuple) else value
        if name:
            found[section][name] = plain
        else:
            found[section] = plain
    return {name: value for name, value in found.items() if value != {}}


def _few() -> int:
    from dattrain.config.choose import FEW

    return FEW


def _usable(asked: Mapping[str, Any]) -> dict[str, Any]:
    """What is given, without what other values cannot be computed from: the schema says what is wrong with it."""
    numbers = ("train.global_batch", "schedule.epochs", "optim.lr")
    return {
        key: value
        for key, value in asked.items()
        if key not in numbers
        or (isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0)
    }


def _seed(recipe: str | None, asked: Mapping[str, Any]) -> int:
    from dattrain.config.load import load

    seed = asked.get("train.seed", 0 if recipe is None else load(recipe).config.train.seed)
    return seed if isinstance(seed, int) else 0


def name_of(data: Path, start: Start | None) -> str:
    """Of the run: the folder's, as a file and a job may be called."""
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", data.absolute().name).strip("_") or "images"
    return name if start is None else f"{name}-from-{start.cfg.name}"


def _all_in(classes: Sequence[str], label_set: str, count: int) -> bool:
    from dattrain.data import labels
    from dattrain.data.classes import are_synsets

    return are_synsets(classes) and set(classes) <= set(labels.label_set(label_set, classes=count).synsets)


def _check_same(run: Path, data: Path) -> None:
    """Refuse to go on with a run of other images."""
    from dattrain.config.load import load
    from dattrain.data.source import split_file

    train = load(run).config.data.train
    if train is None:
        raise ConfigError(f"{run}: is a run without data.train; choose another --run")
    there = split_file.read(train)[0] if train.endswith(split_file.SUFFIX) else Path(train)
    there, given = there.resolve(), data.resolve()
    if given != there and given not in there.parents[:3]:
        raise ConfigError(f"{run}: is a run on {there}, not on {data}; choose another --run")


def _counts(train: Mapping[str, int]) -> str:
    if len(train) <= 8:
        return ", ".join(f"{name} {count:,}" for name, count in train.items())
    first = ", ".join(f"{name} {count:,}" for name, count in list(train.items())[:4])
    least, most = (pick(train.items(), key=lambda item: item[1]) for pick in (min, max))
    return f"{first}, ...; fewest: {least[0]} {least[1]:,}; most: {most[0]} {most[1]:,}"


def _warnings(train: Mapping[str, int]) -> list[str]:
    found = []
    least, most = min(train.values()), max(train.values())
    if most >= IMBALANCE * least:
        found.append(
            f"the largest class has {most // least} times the images of the smallest: accuracy will lean to it; `dattrain eval RUN "
            "--csv FOLDER` writes the accuracy of each class"
        )
    if small := [name for name, count in train.items() if count < SMALL_CLASS]:
        from dattrain.data.classes import few

        found.append(f"{len(small)} class(es) have fewer than {SMALL_CLASS} images to train on: {few(small)}")
    return found


def _sizes(own: Own) -> str:
    if not own.widths:
        return "unknown: no header could be read"
    pairs = sorted(zip(own.widths, own.heights), key=lambda pair: pair[0] * pair[1])
    (w, h), (wide, high) = pairs[0], pairs[-1]
    return f"{w} x {h} to {wide} x {high} px, median shorter side {own.side} (headers of {len(pairs)})"


def _pixels(size: Any) -> str:
    return f"{size} px" if isinstance(size, int) else f"{size[0]} x {size[1]} px"


def _device(machine: Machine) -> str:
    import torch

    name = torch.cuda.get_device_name() if machine.device == "cuda" else f"CPU, {machine.cores} core(s)"
    return name if machine.devices == 1 else f"{machine.devices} x {name}"
