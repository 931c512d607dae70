"""One way to open a model for evaluation, prediction, drawing and export: run folder, checkpoint or weights file.

A weights file is safetensors in our names whose metadata holds a ``PretrainedCfg``: enough to build the network and to feed it.
Nothing is ever unpickled here; the authors' ``.pth`` files come in by ``dattrain import``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dattrain.config.load import load as load_config
from dattrain.config.run import run_of, split_checkpoint
from dattrain.config.schema import Config
from dattrain.config.values import as_pair
from dattrain.data.classes import read as read_classes
from dattrain.data.source.dataset import open_dataset
from dattrain.errors import ConfigError, UserError
from dattrain.files import replacing
from dattrain.models.dat import DAT
from dattrain.models.surgery import adopt_tables
from dattrain.pretrained.pretrained_cfg import (
    NETWORKS,
    Network,
    PretrainedCfg,
    build,
    cfg_of_recipe,
    differences,
)
from dattrain.runtime import collectives
from dattrain.runtime.environment import device_called
from dattrain.state import gather
from dattrain.state.format import named
from dattrain.state.format.manifest import Manifest, read_manifest

METADATA_KEY = "dattrain"


def load_model(
    path: str | Path,
    *,
    ema: bool | None = None,
    device: str | torch.device = "cpu",
    img_size: int | tuple[int, int] | None = None,
    bias_table: Literal["resize", "sample"] | None = None,
) -> tuple[Network, PretrainedCfg]:
    """Open weights as a model in evaluation mode, fp32: an image classifier, or as ``cfg.task`` says a ``Segmenter`` or ``Detector``.

    Args:
        path: a run folder or its ``checkpoints`` (the newest complete checkpoint is taken; ``RUN@best`` and ``RUN@STEP`` name
            another), a checkpoint folder, a safetensors file that ``dattrain import`` or ``export`` wrote, or a folder from
            ``export --to timm``.
        ema: the averaged weights; None takes them where a checkpoint has them. A file holds one set of weights.
        img_size: lay a classifier out for another size; None keeps that of the weights.
        bias_table: at another size, ``resize`` window and deformable tables bicubically (None does), or leave the continuous
            deformable tables as they are and ``sample`` them (windows then keep their size too).

    Raises:
        UserError: there is nothing to open, it is damaged, the tensors are not those of the model it names, or there is no such
            device.
        ConfigError: ``img_size`` or ``bias_table`` for a network of dense prediction, which takes images of any size; ``bias_table`` alone.
    """
    device = device_called(device)
    asked = path = Path(path)
    if path.is_dir() and (path / "model.safetensors").is_file():
        path = path / "model.safetensors"
    path = named.weights(path, hint=collectives.rank_and_world()[0] == 0)
    if path.is_dir():
        model, cfg = _from_checkpoint(path, ema)
    elif path.is_file():
        model, cfg = _from_file(path)
    else:
        raise UserError(f"{path}: no such run folder, checkpoint or safetensors file")
    if img_size is not None or bias_table is not None:
        if not isinstance(model, DAT):
            which = "bias_table (--bias-table)" if img_size is None else "img_size (--img-size)"
            raise ConfigError(
                f"{asked}: is {NETWORKS[cfg.task]}, which takes images of any size: leave {which} out"
            )
        if img_size is None:
            raise ConfigError(
                f"bias_table={bias_table} (--bias-table) is of another img_size: give that (--img-size), or leave it out"
            )
        size = as_pair(img_size)
        if bias_table != "sample":
            model.set_input_size(size)
        cfg = replace(cfg, img_size=size)
    return model.to(device).eval(), cfg


def load_classifier(path: str | Path, purpose: str, **options: Any) -> tuple[DAT, PretrainedCfg]:
    """``load_model`` where only an image classifier, or its backbone, will do; its arguments and errors.

    Args:
        path: as for ``load_model``.
        purpose: what only these are good for, for the message: ``"--to onnx"``.
        options: as for ``load_model``.

    Raises:
        ConfigError: they are weights of a segmentation network or a detector.
    """
    model, cfg = load_model(path, **options)
    return classifier(model, cfg, path, purpose), cfg


def classifier(model: Network, cfg: PretrainedCfg, path: str | Path, purpose: str) -> DAT:
    """``model``, which ``path`` holds. Raises ConfigError where it is no image classifier; arguments of ``load_classifier``."""
    if not isinstance(model, DAT):
        raise ConfigError(f"{path}: is {NETWORKS[cfg.task]}, and {purpose} is for image classifiers")
    return model


def save(
    path: str | Path, state: Mapping[str, Tensor], cfg: PretrainedCfg, *, model: DAT | None = None
) -> None:
    """Write a weights file under a temporary name, then rename it, so that what has the name is complete.

    Args:
        model: read the file back as ``load_model`` does, and give it its name only where it holds this network.

    Raises:
        UserError: the file cannot be written, or does not hold ``model``.
    """
    path = Path(path)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            save_file(tensors, part, {METADATA_KEY: cfg.to_json(), "format": "pt"})
            if model is not None:
                _check_same(path, part, model)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be written: {error}") from error


def _check_same(path: Path, tmp_path: Path, model: DAT) -> None:
    """Read ``tmp_path``, to become ``path``, as ``eval`` does. Raises UserError where it is not ``model``."""
    try:
        back, _ = load_model(tmp_path)
    except UserError as error:
        raise UserError(
            f"{path}: not written, since it could not be read back ({error}); please report this"
        ) from error
    written, found = model.state_dict(), back.state_dict()
    assert isinstance(back, DAT)  # as the pretrained config says
    differing = [
        *(name for name, tensor in written.items() if not torch.equal(_wide(tensor), found[name])),
        *differences(model, back),
    ]
    if differing:
        raise UserError(
            f"{path}: not written, since read back it has another {', '.join(differing[:3])}; please report this"
        )


def config_of(path: str | Path) -> Config | None:
    """The recipe of the run that a run folder, checkpoint or ``checkpoints`` folder belongs to; None for a file."""
    path, _ = split_checkpoint(path)
    run = run_of(path) if path.is_dir() else None
    return None if run is None else load_config(run / "config.yaml").config


def cfg_of_checkpoint(folder: Path, manifest: Manifest, *, ema: bool) -> PretrainedCfg | None:
    """The pretrained config of the weights in a checkpoint folder; None where no run folder around it has a ``config.yaml``.

    With progressive resizing it says the size that the tensors are laid out for, whichever phase that is.
    """
    run = run_of(folder)
    if run is None:
        return None
    config = load_config(run / "config.yaml").config
    source = f"{run.name}, step {manifest.step}" + (", EMA" if ema else "")
    names = class_names(run, config, manifest.meta.get("class_names") or ())
    cfg = replace(cfg_of_recipe(config, source=source), classes=names)
    found = {name: tuple(parameter.shape) for name, parameter in manifest.parameters.items()}
    sizes = [config.model.img_size, *(phase.img_size for phase in config.train.progressive)]
    cfgs = [replace(cfg, img_size=size) for size in dict.fromkeys(map(as_pair, sizes))]
    if len(cfgs) == 1:
        return cfg
    return next((each for each in cfgs if _shapes(build(each, meta=True).state_dict()) == found), cfgs[0])


def class_names(run: Path, config: Config, in_checkpoint: Sequence[str] = ()) -> tuple[str, ...]:
    """Names of the classes, as the run or its checkpoint noted them; of the training set, where neither did (an older run)."""
    noted = read_classes(run)
    if noted is None:
        noted = tuple(in_checkpoint) or None
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


def _from_checkpoint(folder: Path, ema: bool | None) -> tuple[Network, PretrainedCfg]:
    manifest = read_manifest(folder)
    if ema is None:
        ema = "ema" in manifest.states
    cfg = cfg_of_checkpoint(folder, manifest, ema=ema)
    if cfg is None:
        raise UserError(
            f"{folder}: no config.yaml in the run folder around it says which model it holds; "
            "give the run folder, or put the run's config.yaml beside its checkpoints"
        )
    state = gather.load_tensors(folder, "ema" if ema else "param")
    return _filled(cfg, state, str(folder)), cfg


def _from_file(path: Path) -> tuple[Network, PretrainedCfg]:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, ValueError) as error:
        hint = (
            "; `dattrain import` reads the authors' files" if path.suffix in (".pth", ".pt", ".bin") else ""
        )
        raise UserError(f"{path}: not a complete safetensors file ({error}){hint}") from None
    if METADATA_KEY not in metadata:
        raise UserError(
            f"{path}: its metadata does not say which model it holds; `dattrain import {path}` reads files of the authors"
        )
    try:
        cfg = PretrainedCfg.from_json(metadata[METADATA_KEY])
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: its metadata is not of this version of dattrain ({error})") from None
    return _filled(cfg, state, str(path)), cfg


def _filled(cfg: PretrainedCfg, state: Mapping[str, Tensor], source: str) -> Network:
    """The model with its tensors; every one must be there, of its shape, and none left over."""
    model = build(cfg, meta=True)
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
    if any(buffer.is_meta for name, buffer in model.named_buffers() if name not in expected):
        model = build(cfg)  # timm's networks compute buffers where they are built, and no file has them
        adopt_tables(model, _shapes(state))
    model.load_state_dict({name: _wide(tensor) for name, tensor in state.items()}, assign=True)
    return model


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor
