"""A model with its engine, average and rates, at one image size; and how it comes to be: drawn, fine-tuned, or carried over.

Progressive resizing ends one session and opens the next from the checkpoint between them (``carry``).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dattrain.config.derive import Derived
from dattrain.config.load import load as load_config
from dattrain.config.schema import Config
from dattrain.data import labels
from dattrain.data.classes import FILE as CLASSES_FILE
from dattrain.data.classes import Classes, few
from dattrain.data.classes import read as read_classes
from dattrain.engine import activation_checkpointing, optim, zero
from dattrain.engine import compile as compiling
from dattrain.engine.ema import Ema
from dattrain.engine.step import Updater
from dattrain.errors import ConfigError, UserError
from dattrain.models import surgery, zoo
from dattrain.models.dat import DAT
from dattrain.runtime import collectives
from dattrain.state import gather, partition
from dattrain.state.format import checkpoint
from dattrain.state.format.manifest import Manifest
from dattrain.state.partition import MOMENTS, LocalState

Size = int | tuple[int, int]

log = logging.getLogger(__name__)


@dataclass
class Session:
    """Everything that depends on the image size."""

    img_size: Size
    engine: Any
    ema: Ema | None
    updater: Updater

    @property
    def ema_tensors(self) -> list[Tensor] | None:
        """What a checkpoint saves and restores of the average."""
        return None if self.ema is None else self.ema.tensors

    def close(self) -> None:
        """End the engine: its hooks and buffers."""
        self.engine.destroy()


def size_at(config: Config, samples_seen: int, samples_per_epoch: int) -> Size:
    """Image size of the update that begins at ``samples_seen``."""
    size: Size = config.model.img_size
    for phase in config.train.progressive:
        # Epochs are fractions; a phase begins with the first update at or after it.
        if samples_seen >= phase.epoch * samples_per_epoch - 0.5:
            size = phase.img_size
    return size


def as_pair(size: Any) -> tuple[int, int]:
    """(height, width) of a size in a recipe or in JSON: one number, or two."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def build_model(config: Config, img_size: Size) -> DAT:
    """The recipe's model with fresh weights from ``train.seed``: the same on every rank."""
    m = config.model
    torch.manual_seed(config.train.seed)
    return zoo.create(
        m.name,
        num_classes=m.num_classes,
        img_size=img_size,
        in_chans=m.in_chans,
        drop_path_rate=m.drop_path,
        init=m.init,
        **m.overrides,
    )


def open_session(
    config: Config,
    derived: Derived,
    device: torch.device,
    img_size: Size,
    *,
    manifest: Manifest | None = None,
    classes: Classes | None = None,
) -> Session:
    """Build model and engine. Collective.

    Args:
        manifest: of the checkpoint that will be loaded: weights need not come from ``init.from``, and continuous tables
            take the shapes that they have there. None for a fresh start.
        classes: of the network's outputs, for ``init.head``; None where they are unknown.
    """
    model = build_model(config, img_size)
    if manifest is None:
        if config.init.from_ is not None:
            initialise(model, config, classes)
    elif config.init.bias_table == "sample":
        surgery.adopt_tables(model, {name: p.shape for name, p in manifest.parameters.items()})
    activation_checkpointing.apply(model, config.train.remat)
    scales = optim.layer_scales(model, config.optim.layer_decay) if config.optim.layer_decay < 1 else None
    optimizer = optim.build(model, config, device)
    compiling.apply(model, config.train.compile, graphs_on=device.type if config.train.cuda_graphs else None)
    engine = zero.initialize(model, optimizer, zero.ds_config(config, derived, device=device.type), device)
    if scales is not None:
        assert isinstance(optimizer, optim.AdamW)
        optim.apply_layer_decay(optimizer, LocalState(engine), scales)
    ema = Ema(engine, config.train.ema_decay) if config.train.ema_decay > 0 else None
    drop_path = model.num_drop_path if config.model.drop_path > 0 else 0
    engine.train()
    return Session(img_size, engine, ema, Updater(engine, config, derived.accumulation, drop_path, device))


# Fine-tuning ------------------------------------------------------------------------------------------------------


def initialise(model: DAT, config: Config, classes: Classes | None = None) -> surgery.LoadReport:
    """Load the weights that ``init`` names into ``model``; prints the fate of every tensor.

    Raises:
        UserError: nothing usable at ``init.from``, or tensors that do not fit.
    """
    init = config.init
    assert init.from_ is not None
    tensors, what = shared_source(Path(init.from_), ema=init.ema)
    buffers = {name for name, _ in model.named_buffers()}
    tensors = {name: tensor for name, tensor in tensors.items() if name not in buffers}
    index = None
    head = tensors.get(surgery.HEAD[0])
    known = classes or Classes(config.model.num_classes, (), "this recipe")
    if init.head == "keep" and head is not None:
        check_same(known, source_classes(Path(init.from_), len(head), guess=False))
    if init.head == "map":
        found = class_map(
            known, source_classes(Path(init.from_), 0 if head is None else len(head), guess=True)
        )
        log.info("init.head=map: %s", found.report())
        index = found.index
    try:
        report = surgery.resize_for(
            model, tensors, bias_table=init.bias_table, head=init.head, class_map=index
        )
    except UserError as error:
        raise UserError(f"init.from={init.from_}: {error}") from error
    log.info("init.from=%s (%s): %s", init.from_, what, report)
    return report


def shared_source(path: Path, *, ema: bool) -> tuple[dict[str, Tensor], str]:
    """``read_source`` on rank 0, for all. Collective: a thousand ranks that read every shard would be a load of their own."""
    what = ""

    def read() -> Iterator[tuple[str, Tensor]]:
        nonlocal what
        tensors, what = read_source(path, ema=ema)
        yield from tensors.items()

    tensors = dict(collectives.tensors_from_first(read))
    return tensors, collectives.broadcast(what)


def read_source(path: Path, *, ema: bool) -> tuple[dict[str, Tensor], str]:
    """Weights by name out of a run, a checkpoint or a safetensors file, and what they are.

    Raises:
        UserError: there is nothing of the kind. Pickles are not read: ``dattrain import`` does that, when asked to.
    """
    if path.is_file():
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path), "weights of a file"
        except (SafetensorError, OSError, ValueError) as error:
            hint = "; `dattrain import` reads pickles" if path.suffix in (".pth", ".pt", ".bin") else ""
            raise UserError(f"init.from={path} is not a whole safetensors file ({error}){hint}") from None
    if not path.is_dir():
        raise UserError(f"init.from={path}: no such run folder, checkpoint or file")
    folder = checkpoint.locate(path)
    manifest = checkpoint.check(folder)
    state: gather.State = "ema" if ema and "ema" in manifest.states else "param"
    what = f"step {manifest.step}" + (", EMA" if state == "ema" else "")
    return gather.load_tensors(folder, state), what


def source_classes(path: Path, count: int, *, guess: bool) -> Classes:
    """The classes of ``init.from``'s ``count`` outputs: as its run folder or file names them, else its label set's, else
    (``guess``) those of the label set of that size; without names where none of these says.

    Raises:
        UserError: its label set needs a file that is not there.
    """
    names: tuple[str, ...] = ()
    label_set: str | None = None
    run = next((p for p in (path, *path.absolute().parents[:2]) if (p / "config.yaml").is_file()), None)
    if path.is_file():
        card = _card(path)
        names, label_set = tuple(card.get("classes") or ()), card.get("labels")
    elif run is not None:
        names = read_classes(run) or ()
        label_set = load_config(run / "config.yaml").config.data.labels
    label_set = label_set or (labels.infer(count) if guess else None)
    if len(names) != count and label_set is not None:
        names = labels.label_set(label_set, classes=count).synsets
    return Classes(count, names if len(names) == count else (), f"init.from={path}")


def class_map(target: Classes, source: Classes) -> labels.ClassMap:
    """Where each class of the new head is in the source's, by name.

    Raises:
        ConfigError: the names of one of them are unknown, or they have no class in common.
    """
    if not source.names:
        raise ConfigError(
            f"init.head=map: nothing says what the {source.count} classes of {source.source} are called; it takes a "
            f"data.labels, a run folder with {CLASSES_FILE}, or a file that `dattrain export` wrote"
        )
    if not target.names:
        raise ConfigError(
            "init.head=map needs the names of the new head's classes: set data.labels, or train on class folders or "
            "shards that `dattrain data pack` wrote of such"
        )
    found = labels.class_map(
        labels.LabelSet(target.source, target.names), labels.LabelSet(source.source, source.names)
    )
    if len(found.missing) == target.count:
        raise ConfigError(
            f"init.head=map: no class of {target.source} ({few(target.names)}) is one of {source.source} "
            f"({few(source.names)}); init.head=new draws a fresh head"
        )
    return found


def check_same(target: Classes, source: Classes) -> None:
    """Refuse ``init.head=keep`` where a row of the head would come to stand for another class.

    Raises:
        ConfigError: both are known by name, and differ.
    """
    if not target.names or not source.names or target.count != source.count:
        return
    for number, (new, old) in enumerate(zip(target.names, source.names)):
        if new != old:
            raise ConfigError(
                f"init.head=keep: class {number} is {old!r} in {source.source} and {new!r} by {target.source}; "
                "init.head=map joins classes by name, init.head=new draws a fresh head"
            )


def _card(path: Path) -> dict[str, Any]:
    """What a weights file says of itself; empty where it says nothing."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    try:
        card = json.loads(metadata.get("dattrain", "{}"))
        return {**card, "classes": card.get("classes") or json.loads(metadata.get("classes", "[]"))}
    except (ValueError, AttributeError):
        return {}


# Carrying over to another size ------------------------------------------------------------------------------------


@torch.no_grad()
def carry(session: Session, config: Config, folder: Path) -> Manifest:
    """Fill ``session`` from a checkpoint of another image size. Collective; rank 0 reads all of it and sends it to the others.

    Weights and averages are resized as ``init.bias_table`` says. The moments of a table that was resized begin anew: the
    first at zero, the second at its mean over each head, so that no element's first steps are out of proportion.
    """
    manifest = collectives.from_first(lambda: checkpoint.check(folder))
    local = LocalState(session.engine)
    local.begin_write()
    local.create_moments(
        {name: p.opt_step or 0 for name, p in manifest.parameters.items() if name in local.parameters}
    )
    states: list[gather.State] = ["param", *MOMENTS]  # type: ignore[list-item]
    if session.ema is not None:
        states.append("ema" if "ema" in manifest.states else "param")
    for position, state in enumerate(states):
        target = "ema" if position == 3 else state
        for name, tensor in _resized(config, session.img_size, local, folder, state):
            for fragment in local.fragments:
                if fragment.name != name:
                    continue
                held = local.tensor(fragment, target, session.ema_tensors)
                if held is not None:
                    values = tensor.reshape(-1)[fragment.start : fragment.start + fragment.numel]
                    partition.write(held, fragment.offset, values.to(held.device))
    buffers = local.buffers()
    for name, value in collectives.tensors_from_first(lambda: gather.load_buffers(folder).items()):
        if name in buffers and buffers[name].shape == value.shape:
            buffers[name].copy_(value)
    local.set_scalars(manifest.engine)
    local.refresh()
    return manifest


def _resized(
    config: Config, img_size: Size, local: LocalState, folder: Path, state: gather.State
) -> Iterator[tuple[str, Tensor]]:
    held = collectives.tensors_from_first(lambda: gather.iter_tensors(folder, state))
    if state in ("param", "ema"):
        tensors = dict(held)
        scratch = build_model(config, img_size)
        surgery.resize_for(scratch, tensors, bias_table=config.init.bias_table)
        yield from ((name, p.detach()) for name, p in scratch.named_parameters())
        return
    for name, tensor in held:
        shape = local.parameters[name].shape
        if tuple(tensor.shape) != shape:
            mean = tensor.mean(dim=(1, 2), keepdim=True)
            tensor = torch.zeros(shape) if state == "exp_avg" else mean.expand(shape).contiguous()
        yield name, tensor
