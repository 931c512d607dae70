"""One way to open a model for evaluation, prediction, drawing and export: run folder, checkpoint or weights file.

A weights file is safetensors in our names whose metadata holds a ``Card``: enough to build the network and to feed it.
Nothing is ever unpickled here; the authors' ``.pth`` files come in by ``dattrain import``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dattrain.config.load import load as load_config
from dattrain.config.schema import Config
from dattrain.data import labels
from dattrain.data.classes import Classes
from dattrain.data.classes import read as read_classes
from dattrain.data.source.dataset import open_dataset
from dattrain.errors import UserError
from dattrain.models.dat import DAT
from dattrain.models.deformable import Conventions
from dattrain.models.surgery import adopt_tables
from dattrain.models.zoo import create, variant_of
from dattrain.state import gather
from dattrain.state.format import checkpoint

_SETTINGS = (
    "patch_size",
    "dims",
    "blocks",
    "heads",
    "groups",
    "strides",
    "offset_kernels",
    "sr_ratios",
    "shift",
    "neighborhood",
    "stem",
    "mlp",
    "local_perception",
    "mlp_ratio",
    "global_pool",
)
"""Attributes of ``DAT`` that are arguments of its constructor and shape the network, beside those of its windows."""
_USED_BY = {
    "groups": "D",
    "strides": "D",
    "offset_kernels": "D",
    "sr_ratios": "P",
    "neighborhood": "N",
    "shift": "S",
}
"""Kinds of block that a setting matters to."""

METADATA_KEY = "dattrain"
FORMAT = 1


@dataclass(frozen=True)
class Card:
    """What is known of a set of weights beside the tensors.

    ``name`` to ``in_chans`` and ``overrides`` are arguments of ``zoo.create``; ``mean``, ``std``, ``resize`` and
    ``crop_pct`` say how images are prepared; ``labels`` names a label set of ``data.labels``; ``classes`` holds a name
    per class, or nothing; ``source`` tells where the weights came from.
    """

    name: str
    num_classes: int
    img_size: tuple[int, int]
    in_chans: int = 3
    overrides: Mapping[str, Any] | None = None
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    resize: Literal["shorter", "squash"] = "shorter"
    crop_pct: float = 0.875
    interpolation: str = "bicubic"
    labels: str | None = None
    classes: tuple[str, ...] = ()
    source: str = ""

    def to_json(self) -> str:
        """As kept in a file's metadata."""
        return json.dumps({"format": FORMAT, **asdict(self)})

    @classmethod
    def from_json(cls, text: str) -> Card:
        """The reverse of ``to_json``. Raises ValueError for anything else."""
        content = json.loads(text)
        if content.pop("format", None) != FORMAT:
            raise ValueError(f"not of format {FORMAT}")
        for key in ("img_size", "mean", "std", "classes"):
            content[key] = tuple(content[key])
        content["overrides"] = _tuples(content.get("overrides") or {})
        try:
            return cls(**content)
        except TypeError as error:
            raise ValueError(str(error)) from None


def build(card: Card, *, meta: bool = False) -> DAT:
    """The network that the card describes, with fresh weights, or without any memory (``meta``)."""
    with torch.device("meta" if meta else "cpu"):
        return create(
            card.name,
            num_classes=card.num_classes,
            img_size=card.img_size,
            in_chans=card.in_chans,
            **_tuples(card.overrides or {}),
        )


def load_model(
    path: str | Path,
    *,
    ema: bool | None = None,
    device: str | torch.device = "cpu",
    img_size: int | tuple[int, int] | None = None,
    bias_table: Literal["resize", "sample"] = "resize",
) -> tuple[DAT, Card]:
    """Open weights as a model in evaluation mode, fp32.

    Args:
        path: a run folder or its ``checkpoints`` (the newest whole checkpoint is taken), a checkpoint folder, a
            safetensors file that ``dattrain import`` or ``export`` wrote, or a folder from ``export --to timm``.
        ema: the averaged weights; None takes them where a checkpoint has them. A file holds one set of weights.
        img_size: lay the model out for another size; None keeps that of the weights.
        bias_table: at another size, ``resize`` window and deformable tables bicubically, or leave the continuous
            deformable tables as they are and ``sample`` them (windows then keep their size too).

    Raises:
        UserError: there is nothing to open, it is damaged, or the tensors are not those of the model it names.
    """
    path = Path(path)
    if path.is_dir() and (path / "model.safetensors").is_file():
        path = path / "model.safetensors"
    if path.is_dir():
        model, card = _from_checkpoint(path, ema)
    elif path.is_file():
        model, card = _from_file(path)
    else:
        raise UserError(f"{path}: no such run folder, checkpoint or safetensors file")
    if img_size is not None:
        size = _pair(img_size)
        if bias_table == "resize":
            model.set_input_size(size)
        card = replace(card, img_size=size)
    return model.to(device).eval(), card


def card_of(config: Config, *, source: str = "") -> Card:
    """The card of a recipe's model."""
    model = config.model
    return Card(
        name=model.name,
        num_classes=model.num_classes,
        img_size=_pair(model.img_size),
        in_chans=model.in_chans,
        overrides=dict(model.overrides),
        mean=config.augment.mean,
        std=config.augment.std,
        resize=config.eval.resize,
        crop_pct=config.eval.crop_pct,
        interpolation=config.augment.interpolation,
        labels=config.data.labels,
        source=source,
    )


def card_of_model(model: DAT, **known: Any) -> Card:
    """The card of a model: the variant nearest to it, and as overrides what differs. ``known`` are other fields."""
    name = variant_of(model)
    if name is None:
        name = "dat_pp_tiny" if any("N" in kinds for kinds in model.blocks) else "dat_tiny"
    with torch.device("meta"):
        usual = create(name, num_classes=model.num_classes, img_size=model.img_size, in_chans=model.in_chans)
    overrides = {
        key: getattr(model, key) for key in _SETTINGS if _effective(model, key) != _effective(usual, key)
    }
    overrides |= {
        key: getattr(model.conventions, key)
        for key in Conventions.__dataclass_fields__
        if getattr(model.conventions, key) != getattr(usual.conventions, key)
    }
    # Two settings give windows: one of them tells what the variant does not do by itself.
    if _windows(model) != _windows(usual):
        key = "window_divisor" if model.window_size is None else "window_size"
        overrides[key] = getattr(model, key)
    return Card(name, model.num_classes, model.img_size, model.in_chans, overrides, **known)


def save(path: str | Path, state: Mapping[str, Tensor], card: Card, *, model: DAT | None = None) -> None:
    """Write a weights file: aside, then renamed, so that what has the name is whole.

    Args:
        model: read the file back as ``load_model`` does, and give it its name only where it holds this network.

    Raises:
        UserError: the file cannot be written, or does not hold ``model``.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.part")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, aside, {METADATA_KEY: card.to_json(), "format": "pt"})
        if model is not None:
            _check_same(path, aside, model)
        aside.replace(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be written: {error}") from error
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)


def _check_same(path: Path, aside: Path, model: DAT) -> None:
    """Read ``aside``, to become ``path``, as ``eval`` does. Raises UserError where it is not ``model``."""
    try:
        back, _ = load_model(aside)
    except UserError as error:
        raise UserError(
            f"{path}: not written, since it could not be read back ({error}); please report this"
        ) from error
    mine, theirs = model.state_dict(), back.state_dict()
    differing = [
        *(name for name, tensor in mine.items() if not torch.equal(_wide(tensor), theirs[name])),
        *(key for key in _SETTINGS if _effective(back, key) != _effective(model, key)),
        *(key for key in ("img_size", "conventions") if getattr(back, key) != getattr(model, key)),
        *(["window_size"] if _windows(back) != _windows(model) else []),
    ]
    if differing:
        raise UserError(
            f"{path}: not written, since read back it has another {', '.join(differing[:3])}; please report this"
        )


def _windows(model: DAT) -> list[tuple[int, int] | None]:
    """(height, width) of the windows of each stage, None for stages without window attention."""
    windows = zip(model.windows(model.img_size), model.blocks)
    return [window if set(kinds) & set("LS") else None for window, kinds in windows]


def config_of(path: str | Path) -> Config | None:
    """The recipe of the run that a run folder, checkpoint or ``checkpoints`` folder belongs to; None for a file."""
    path = Path(path)
    run = run_of(path) if path.is_dir() else None
    return None if run is None else load_config(run / "config.yaml").config


def run_of(folder: Path) -> Path | None:
    """The run folder that a checkpoint, ``checkpoints`` or run folder belongs to: the one with ``config.yaml``."""
    return next((p for p in (folder, *folder.absolute().parents[:2]) if (p / "config.yaml").is_file()), None)


def _effective(model: DAT, key: str) -> Any:
    """A setting, with None for the stages that hold no block which it matters to."""
    letters = _USED_BY.get(key)
    value = getattr(model, key)
    if letters is None:
        return value
    stages = [bool(set(kinds) & set(letters)) for kinds in model.blocks]
    if isinstance(value, tuple):
        return [each if used else None for each, used in zip(value, stages)]
    return value if any(stages) else None


def card_of_checkpoint(folder: Path, manifest: checkpoint.Manifest, *, ema: bool) -> Card | None:
    """The card of the weights in a checkpoint folder; None where no run folder around it has a ``config.yaml``.

    With progressive resizing it says the size that the tensors are laid out for, whichever phase that is.
    """
    run = run_of(folder)
    if run is None:
        return None
    config = load_config(run / "config.yaml").config
    source = f"{run.name}, step {manifest.step}" + (", EMA" if ema else "")
    card = replace(card_of(config, source=source), classes=class_names(run, config))
    found = {name: tuple(parameter.shape) for name, parameter in manifest.parameters.items()}
    sizes = [config.model.img_size, *(phase.img_size for phase in config.train.progressive)]
    cards = [replace(card, img_size=size) for size in dict.fromkeys(map(_pair, sizes))]
    return next((each for each in cards if _shapes(build(each, meta=True).state_dict()) == found), cards[0])


def class_names(run: Path, config: Config) -> tuple[str, ...]:
    """Names of the classes of a run, as it noted them; of the training set, where it did not (an older run)."""
    noted = read_classes(run)
    if noted is not None:
        return noted
    if config.data.labels is not None or config.data.train is None or "://" in config.data.train:
        return ()
    try:
        dataset = open_dataset(config.data.train)
    except UserError:  # the data are elsewhere now
        return ()
    dataset.close()
    names = tuple(dataset.classes or ())
    return names if len(names) == config.model.num_classes else ()


def classes_of(card: Card) -> Classes:
    """The classes of a network's outputs, as its card tells them: by name, or by its label set."""
    names = card.classes
    if len(names) != card.num_classes and card.labels is not None:
        try:
            names = labels.label_set(card.labels, classes=card.num_classes).synsets
        except UserError:  # winter21 without its file
            names = ()
    return Classes(card.num_classes, tuple(names) if len(names) == card.num_classes else (), "the network")


def _from_checkpoint(path: Path, ema: bool | None) -> tuple[DAT, Card]:
    folder = checkpoint.locate(path)
    manifest = checkpoint.read_manifest(folder)
    if ema is None:
        ema = "ema" in manifest.states
    card = card_of_checkpoint(folder, manifest, ema=ema)
    if card is None:
        raise UserError(
            f"{folder}: no config.yaml in the run folder around it says which model it holds; "
            "give the run folder, or put the run's config.yaml beside its checkpoints"
        )
    state = gather.load_tensors(folder, "ema" if ema else "param")
    return _filled(build(card, meta=True), state, str(folder)), card


def _from_file(path: Path) -> tuple[DAT, Card]:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, ValueError) as error:
        hint = (
            "; `dattrain import` reads the authors' files" if path.suffix in (".pth", ".pt", ".bin") else ""
        )
        raise UserError(f"{path}: not a whole safetensors file ({error}){hint}") from None
    if METADATA_KEY not in metadata:
        raise UserError(
            f"{path}: its metadata does not say which model it holds; `dattrain import {path}` reads files of the authors"
        )
    try:
        card = Card.from_json(metadata[METADATA_KEY])
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: its metadata is not of this version of dattrain ({error})") from None
    return _filled(build(card, meta=True), state, str(path)), card


def _filled(model: DAT, state: Mapping[str, Tensor], source: str) -> DAT:
    """Give the (meta) model its tensors; every one must be there, of its shape, and none left over."""
    # Continuous tables that were not resized (init.bias_table=sample) keep the shapes of the resolution before.
    adopt_tables(model, _shapes(state))
    expected = _shapes(model.state_dict())
    wrong = [
        f"{name} is {tuple(state[name].shape)}, not {shape}" if name in state else f"{name} is missing"
        for name, shape in expected.items()
        if name not in state or tuple(state[name].shape) != shape
    ]
    wrong += [f"{name} is unknown" for name in state if name not in expected]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"{source}: the tensors are not those of its model: {'; '.join(wrong[:3])}{more}")
    model.load_state_dict({name: _wide(tensor) for name, tensor in state.items()}, assign=True)
    return model


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _tuples(overrides: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in overrides.items()}
