"""``dattrain export``: weights and graphs for other programs, each loaded back and compared on real images.

Formats: ``safetensors`` (ours), ``authors`` (their names, with their YAML), ``timm`` (a folder that
``timm.create_model("local-dir:...")`` takes), ``onnx`` and ``torch.export`` (one graph per image size, any batch size).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dattrain.errors import ConfigError, UserError

if TYPE_CHECKING:
    from torch import Tensor

    from dattrain.models.dat import DAT
    from dattrain.pretrained.pretrained_cfg import PretrainedCfg

FORMATS = ("safetensors", "authors", "timm", "onnx", "torch.export")
SUFFIX = {
    "safetensors": ".safetensors",
    "authors": ".pth",
    "timm": "",
    "onnx": ".onnx",
    "torch.export": ".pt2",
}

LOWEST_OPSET = 18
"""Of ONNX: torch.onnx has no operators below; it would convert, fail on ``Pad``, and give 18 under another number."""

EXACT, GRAPH = 1e-6, 1e-3
"""Largest difference of logits that is accepted, relative to their largest. The same numbers may lie otherwise in memory, where
matrix products then sum in another order; graphs have other operators too."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("model", metavar="RUN|CHECKPOINT|FILE")
    parser.add_argument("--to", choices=FORMATS, required=True, help="what to write")
    parser.add_argument("--out", type=Path, required=True, help="the file, or the folder for timm")
    parser.add_argument(
        "--img-size",
        action="append",
        type=int,
        nargs="+",
        metavar="N",
        help="N, or HEIGHT WIDTH; again for another graph of onnx and torch.export (default: as trained)",
    )
    parser.add_argument(
        "--bias-table", choices=("resize", "sample"), default="resize", help="see dattrain eval"
    )
    parser.add_argument(
        "--ema", action=argparse.BooleanOptionalAction, help="averaged weights (default: where there are any)"
    )
    parser.add_argument(
        "--images", nargs="+", metavar="IMAGE", help="what to compare on (default: eight of the demo's)"
    )
    parser.add_argument("--opset", type=int, default=20, help=f"of ONNX, from {LOWEST_OPSET} (default: 20)")
    parser.add_argument("--force", action="store_true", help="replace what is at --out")


@dataclass(frozen=True)
class Written:
    """A file that was written, and how to run it again: images (B x C x H x W) to logits, both on the CPU."""

    path: Path
    cfg: PretrainedCfg
    run: Callable[[Tensor], Tensor]
    tolerance: float


def run(args: argparse.Namespace) -> int:
    """Write, load back, compare; an export that does not give the model's logits is an error."""
    from dattrain.pretrained.preprocess import image_size
    from dattrain.pretrained.weights import load_model

    sizes = [image_size(values) for values in args.img_size or [None]]
    if len(sizes) > 1 and args.to not in ("onnx", "torch.export"):
        raise ConfigError(f"--to {args.to} holds one set of weights: give one --img-size")
    written: list[Written] = []
    for size in sizes:
        model, cfg = load_model(args.model, ema=args.ema, img_size=size, bias_table=args.bias_table)
        out = _target(args.out, args.to, cfg, len(sizes) > 1)
        if out.exists() and not args.force:
            raise UserError(f"{out}: exists; choose another --out, or --force")
        out.parent.mkdir(parents=True, exist_ok=True)
        item = write(model, cfg, args.to, out, opset=args.opset)
        difference, same = compare(model, item, images_for(cfg, args.images))
        written.append(item)
        print(
            f"{item.path}: largest difference of logits {difference:.1e} of the largest, same best class on {same}"
        )
        if difference > item.tolerance:
            raise UserError(
                f"{item.path}: does not give the model's logits (more than {item.tolerance:g}); do not use it"
            )
    return 0


def write(model: DAT, cfg: PretrainedCfg, to: str, out: Path, *, opset: int = 20) -> Written:
    """Write one file (or timm's folder) and load it back."""
    if to == "safetensors":
        return _safetensors(model, cfg, out)
    if to == "authors":
        return _authors(model, cfg, out)
    if to == "timm":
        return _timm(model, cfg, out)
    return _onnx(model, cfg, out, opset) if to == "onnx" else _torch_export(model, cfg, out)


def compare(model: DAT, item: Written, images: Tensor) -> tuple[float, str]:
    """Largest difference of logits relative to the largest logit, and on how many images the best class is the same.

    All together and the first alone, so that a graph with a frozen batch size shows.
    """
    import torch

    with torch.no_grad():
        expected, found = model(images), item.run(images)
        alone, found_alone = model(images[:1]), item.run(images[:1])
    difference = max(float((found - expected).abs().max()), float((found_alone - alone).abs().max()))
    same = int((found.argmax(1) == expected.argmax(1)).sum())
    return difference / float(expected.abs().max()), f"{same} of {len(images)} images"


def images_for(cfg: PretrainedCfg, paths: Sequence[str] | None) -> Tensor:
    """Prepared and normalised images: those named, or eight of Fashion-MNIST's test images."""
    import torch

    from dattrain.data.prepare.sources import read_idx
    from dattrain.pretrained import preprocess

    if paths:
        pixels = [preprocess.read(path) for path in preprocess.find(paths)]
    else:
        file = resources.files("dattrain") / "demo" / "t10k-images-idx3-ubyte.gz"
        with resources.as_file(file) as path:
            pixels = [preprocess.from_array(image) for image in read_idx(str(path))[:8]]
    prepared = torch.stack([preprocess.prepare(each, cfg) for each in pixels])
    if cfg.in_chans in (1, 3):
        return preprocess.normalise(prepared, cfg)
    # Of other channels (depth, infrared) there are no files here: red, green and blue again and again will do to compare.
    colours = replace(cfg, in_chans=3, mean=cfg.mean[:3], std=cfg.std[:3])
    return preprocess.normalise(prepared, colours)[:, torch.arange(cfg.in_chans) % 3]


def _safetensors(model: DAT, cfg: PretrainedCfg, out: Path) -> Written:
    from dattrain.pretrained import weights

    weights.save(out, model.state_dict(), cfg)
    return Written(out, cfg, weights.load_model(out)[0], EXACT)


def _authors(model: DAT, cfg: PretrainedCfg, out: Path) -> Written:
    """``{"model": state}`` as their ``--resume`` and ``--pretrained`` take it, and a YAML beside it for their ``--cfg``."""
    import torch
    import yaml

    from dattrain.cli import import_
    from dattrain.models.surgery import from_authors, to_authors

    config = authors_config(model)
    torch.save({"model": to_authors(model)}, out)
    name = out.with_suffix(".yaml")
    name.write_text(
        yaml.safe_dump({"MODEL": {"TYPE": "dat", "NAME": cfg.name, "DAT": config}}, sort_keys=False),
        encoding="utf-8",
    )
    state, *_ = import_.load(out)
    return Written(out, cfg, from_authors(state, import_.read_config(name)), EXACT)


def authors_config(model: DAT) -> dict[str, Any]:
    """Their MODEL.DAT mapping for this model.

    Raises:
        UserError: a setting that their code does not have.
    """
    height, width = model.img_size
    conventions, stages = model.conventions, len(model.blocks)
    plus = any("N" in kinds for kinds in model.blocks) or model.local_perception
    wanted = ("shifted", "corner") if plus else ("center", "center")
    if height != width or (conventions.reference, conventions.query_grid) != wanted:
        raise UserError(
            f"the authors' {'DAT++' if plus else 'CVPR'} code has square images and reference={wanted[0]}, query_grid={wanted[1]}; "
            f"this model has {height} x {width}, {conventions.reference}, {conventions.query_grid}"
        )
    windows = model.windows(model.img_size)
    if oblong := [w for w, kinds in zip(windows, model.blocks) if set(kinds) & set("LS") and w[0] != w[1]]:
        raise UserError(
            f"the authors' code has square windows; this model's are {oblong[0][0]} x {oblong[0][1]}"
        )
    limit = conventions.offset_range
    deformable = ["D" in kinds for kinds in model.blocks]
    if any(deformable) and limit == ("tanh" if plus else "clamp"):  # their factor of -1 is the other one
        raise UserError(
            f"the authors' {'DAT++' if plus else 'CVPR'} code has no offset_range={limit}, which this model has"
        )
    settings: dict[str, Any] = {
        "img_size": height,
        "patch_size": model.patch_size,
        "num_classes": model.num_classes,
        "expansion": int(model.mlp_ratio),
        "dim_stem": model.dims[0],
        "dims": list(model.dims),
        "depths": list(model.depths),
        "stage_spec": [list(kinds) for kinds in model.blocks],
        "heads": list(model.heads),
        "window_sizes": [window[0] for window in windows],
        "groups": [each if used else -1 for each, used in zip(model.groups, deformable)],
        "strides": [each if used else -1 for each, used in zip(model.strides, deformable)],
        "sr_ratios": [each if "P" in kinds else -1 for each, kinds in zip(model.sr_ratios, model.blocks)],
        "offset_range_factor": [
            (-1 if not used or limit in ("tanh", "clamp") else 0 if limit == "free" else limit)
            for used in deformable
        ],
        "use_pes": [used and conventions.position != "none" for used in deformable],
        "dwc_pes": [used and conventions.position == "dwconv" for used in deformable],
        "fixed_pes": [used and conventions.position == "fixed" for used in deformable],
        "no_offs": [used and not conventions.offsets for used in deformable],
        "use_dwc_mlps": [model.mlp == "conv"] * stages,
        "use_conv_patches": model.stem == "conv",
        "drop_rate": 0.0,
        "attn_drop_rate": 0.0,
        "drop_path_rate": 0.0,
    }
    if plus:
        settings |= {
            "use_lpus": [model.local_perception] * stages,
            "ksizes": list(model.offset_kernels),
            "nat_ksizes": list(model.neighborhood),
        }
    return settings


def _timm(model: DAT, cfg: PretrainedCfg, out: Path) -> Written:
    """model.safetensors and config.json as on the hub; ``import dattrain.models`` must come before timm.create_model."""
    import timm

    import dattrain.models  # noqa: F401 (registers the variants)
    from dattrain.pretrained import weights

    out.mkdir(parents=True, exist_ok=True)
    weights.save(out / "model.safetensors", model.state_dict(), cfg)
    write_timm_config(cfg, out)
    loaded = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    return Written(out, cfg, loaded, EXACT)


def write_timm_config(cfg: PretrainedCfg, folder: Path) -> None:
    """``config.json`` beside ``model.safetensors``, for ``timm.create_model("local-dir:FOLDER")`` after ``import dattrain.models``."""
    (folder / "config.json").write_text(json.dumps(timm_config(cfg), indent=2) + "\n", encoding="utf-8")


def timm_config(cfg: PretrainedCfg) -> dict[str, Any]:
    """What timm's hub format says of a model: its architecture with arguments, and how its images are prepared."""
    from dattrain.models.zoo import VARIANTS

    arguments = {**VARIANTS[cfg.name], **(cfg.overrides or {})}
    return {
        "architecture": cfg.name,
        "num_classes": cfg.num_classes,
        "num_features": arguments["dims"][-1],
        "global_pool": arguments.get("global_pool", "avg"),
        "model_args": {"img_size": list(cfg.img_size), "in_chans": cfg.in_chans, **(cfg.overrides or {})},
        "pretrained_cfg": {
            "tag": "dattrain",
            "custom_load": False,
            "input_size": [cfg.in_chans, *cfg.img_size],
            "fixed_input_size": False,
            "interpolation": cfg.interpolation,
            "crop_pct": cfg.crop_pct,
            "crop_mode": "squash" if cfg.resize == "squash" else "center",
            "mean": list(cfg.mean),
            "std": list(cfg.std),
            "num_classes": cfg.num_classes,
            "first_conv": "patch_embed.conv1" if arguments.get("stem") == "conv" else "patch_embed.proj",
            "classifier": "head.fc",
            "license": "apache-2.0",
        },
        **_label_names(cfg),
    }


def _label_names(cfg: PretrainedCfg) -> dict[str, Any]:
    """``label_names``, one per output, and where these are synsets ``label_descriptions``, their words; nothing where the
    classes are not known. timm's hub format and transformers' pipelines read them."""
    from dattrain.data import labels
    from dattrain.pretrained import class_names

    names = list(cfg.classes)
    if not names and cfg.labels is not None:
        with suppress(UserError):  # winter21 needs a file that may not be here
            names = list(labels.label_set(cfg.labels, classes=cfg.num_classes).synsets)
    if not names or len(names) != cfg.num_classes:
        return {}
    words = class_names.names(len(names), known=names)
    described = {"label_descriptions": dict(zip(names, words))} if words != names else {}
    return {"label_names": names, **described}


def _onnx(model: DAT, cfg: PretrainedCfg, out: Path, opset: int) -> Written:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 (torch.onnx needs it, and names it late)
    except ImportError as error:
        raise UserError(f"--to onnx needs {error.name}: pip install 'dattrain[export]'") from None
    import torch

    if opset < LOWEST_OPSET:
        raise UserError(f"--opset {opset}: {LOWEST_OPSET} is the lowest that torch writes")
    with _quiet("torch.onnx", "onnxscript"):
        program = torch.onnx.export(
            _traced(model, cfg),
            dynamo=True,
            opset_version=opset,
            optimize=True,
            verbose=False,
            input_names=["images"],
            output_names=["logits"],
        )
    assert program is not None
    found = program.model.opset_imports.get("")
    if found != opset:
        # Where its conversion fails, torch logs that and gives what it had.
        raise UserError(
            f"--opset {opset}: torch {torch.__version__} cannot write it (it gave {found}); take a lower one"
        )
    _describe(program.model.metadata_props, cfg)
    program.save(str(out))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(out), options, providers=["CPUExecutionProvider"])

    def logits(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])

    return Written(out, cfg, logits, GRAPH)


def _torch_export(model: DAT, cfg: PretrainedCfg, out: Path) -> Written:
    import torch

    extra = {"card.json": cfg.to_json()}
    torch.export.save(_traced(model, cfg), out, extra_files=extra)
    return Written(out, cfg, torch.export.load(out).module(), GRAPH)


def _traced(model: DAT, cfg: PretrainedCfg) -> Any:
    """The model as a graph of torch's own operators, for any batch size and this image size."""
    import torch

    from dattrain import ops

    images = torch.zeros(2, cfg.in_chans, *cfg.img_size)
    batch = torch.export.Dim("batch", min=1)
    with ops.use_backend("reference"), _plain_attention(), torch.no_grad():
        return torch.export.export(model.eval(), (images,), dynamic_shapes=({0: batch},))


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Warnings of other libraries' loggers are not shown: what matters of them is checked."""
    import logging

    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Within it torch's fused attention is written out as matrix products and a softmax.

    Fused kernels lay their output out otherwise than what an exporter puts in their place, and the graph holds views of it.
    """
    import torch.nn.functional as F

    fused = F.scaled_dot_product_attention

    def plain(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        return (logits if attn_mask is None else logits + attn_mask).softmax(-1) @ v

    F.scaled_dot_product_attention = plain  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = fused


def _describe(metadata: Any, cfg: PretrainedCfg) -> None:
    metadata["dattrain"] = replace(cfg, classes=()).to_json()
    if cfg.classes:
        metadata["classes"] = json.dumps(list(cfg.classes))


def _target(out: Path, to: str, cfg: PretrainedCfg, several: bool) -> Path:
    """The file to write: with the format's suffix, and the size in its name where several are written."""
    suffix = SUFFIX[to]
    if suffix and out.suffix != suffix:
        out = out.with_name(out.name + suffix)
    if several:
        height, width = cfg.img_size
        out = out.with_name(f"{out.stem}_{height}x{width}{out.suffix}")
    return out
