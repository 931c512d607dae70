"""The model card of exported weights: ``README.md`` as the hub reads it. What nobody told us, a license above all, is left to the user."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from dattrain.config.run import run_of
from dattrain.data.source import split_file
from dattrain.errors import UserError
from dattrain.models import flops
from dattrain.models.dat import DAT
from dattrain.observe import metrics
from dattrain.pretrained import class_names
from dattrain.pretrained.pretrained_cfg import PretrainedCfg
from dattrain.pretrained.weights import config_of
from dattrain.state.format import named
from dattrain.state.format.manifest import read_manifest
from dattrain.urls import mask

_PLACES = ("train", "val", "validation", "test", "shards")
"""Folders that every set has: not its name."""
NAMED = 30
"""Class names at most that the card lists; ``config.json`` has all."""


@dataclass(frozen=True)
class Training:
    """What is known of how weights came about; nothing for a file."""

    name: str = ""
    train: str = ""
    val: str = ""
    """Names of the sets, without the folders that they lie in."""
    step: int | None = None
    epochs: float | None = None
    figures: dict[str, float] = field(default_factory=dict)
    """``top1``, ``top5`` in percent, of ``images`` images."""
    code: str = ""
    started_from: str = ""


def training_of(path: str | Path, *, averaged: bool) -> Training:
    """What the run folder of weights says. ``averaged``: they are the averages, which have figures of their own."""
    path = Path(path)
    config = config_of(path)
    if config is None:
        return Training()
    folder = named.weights(path)
    run, step = run_of(folder), read_manifest(folder).step
    assert run is not None
    row: dict[str, Any] = next(
        (row for row in reversed(metrics.read(run)) if row.get("step") == step and "eval_images" in row), {}
    )
    prefix = "ema_" if averaged else ""
    figures = {key: row[prefix + key] for key in ("top1", "top5") if row.get(prefix + key) is not None}
    if figures:
        figures["images"] = int(row["eval_images"])
    epoch = next(
        (r["epoch"] for r in reversed(metrics.read(run)) if r.get("step") == step and r.get("epoch")), None
    )
    try:
        code = json.loads((run / "code.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        code = {}
    revision = f" at {code['revision'][:12]}" if code.get("revision") else ""
    return Training(
        config.name, _set(config.data.train), _set(config.data.val), step, epoch, figures,
        f"dattrain {code['version']}{revision}" if code.get("version") else "", _set(config.init.from_),
    )  # fmt: skip


def text(model: DAT, cfg: PretrainedCfg, training: Training, name: str) -> str:
    """The card.

    Args:
        name: what the model is called, as the folder.
    """
    parts = [
        f"---\n{yaml.safe_dump(_front_matter(cfg, training, name), sort_keys=False)}---\n",
        f"# {name}\n",
        _about(cfg),
    ]
    parts += [
        "## Architecture\n",
        _list(
            {
                "model": f"`{cfg.name}`" + (f" with {_arguments(cfg)}" if cfg.overrides else ""),
                "image size": f"{cfg.img_size[0]} x {cfg.img_size[1]}",
                "parameters": f"{flops.parameters(model) / 1e6:.2f} M",
                "multiply-adds": f"{flops.flops(model, cfg.img_size, cfg.in_chans) / 1e9:.3g} G per image",
                "classes": _classes(cfg),
            }
        ),
        "## Training and evaluation\n",
        _trained(cfg, training),
        "## How to load it\n",
        _usage(name),
        "## License\n",
        "Not stated. Who publishes these weights chooses one that their data and the weights they began with allow, and adds it "
        "to the block at the top of this file: `license: ...`.\n",
        "## References\n",
        "Vision Transformer with Deformable Attention, Xia et al., CVPR 2022 (arXiv 2201.00520)"
        + ("; DAT++: Spatially Dynamic Vision Transformer with Deformable Attention (arXiv 2309.01430)" if "pp" in cfg.name else "")
        + ".\n",
    ]  # fmt: skip
    return "\n".join(parts)


def _front_matter(cfg: PretrainedCfg, training: Training, name: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        "library_name": "timm",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "timm", "deformable-attention"],
    }
    if training.figures:
        rows = [
            {"type": "accuracy", "name": f"top-{key[3:]} accuracy", "value": round(training.figures[key], 3)}
            for key in ("top1", "top5")
            if key in training.figures
        ]
        result = {
            "task": {"type": "image-classification"},
            "dataset": {"type": "other", "name": training.val or "the run's validation set"},
            "metrics": rows,
        }
        found["model-index"] = [{"name": name, "results": [result]}]
    return found


def _about(cfg: PretrainedCfg) -> str:
    kind = "DAT++" if "pp" in cfg.name else "DAT, a Vision Transformer with Deformable Attention"
    origin = f" ({cfg.source})" if cfg.source else ""
    task = "An image classifier" if cfg.num_classes else "A backbone without classification head"
    return f"{task}: {kind}, trained with dattrain{origin}.\n"


def _arguments(cfg: PretrainedCfg) -> str:
    return ", ".join(f"`{key}={value}`" for key, value in (cfg.overrides or {}).items())


def _classes(cfg: PretrainedCfg) -> str:
    names = class_names.names(cfg.num_classes, cfg.labels, cfg.classes)
    if not cfg.classes and not cfg.labels:
        return f"{cfg.num_classes}, whose names are not known"
    more = f" and {len(names) - NAMED} more (`label_names` in config.json)" if len(names) > NAMED else ""
    return f"{cfg.num_classes}: {', '.join(names[:NAMED])}{more}"


def _trained(cfg: PretrainedCfg, training: Training) -> str:
    facts = {
        "recipe": training.name and f"`{training.name}`",
        "training set": training.train,
        "started from": training.started_from,
        "length": training.step is not None
        and f"{training.step:,} updates" + (f", {training.epochs:.1f} epochs" if training.epochs else ""),
        "evaluated on": training.val,
        **{
            f"top-{key[3:]}": f"{training.figures[key]:.2f} % of {training.figures['images']:,} images"
            for key in ("top1", "top5")
            if key in training.figures
        },
        "preparation of images": f"{'squashed' if cfg.resize == 'squash' else 'shorter side resized'}, central crop of "
        f"{cfg.crop_pct:g}, {cfg.interpolation}, mean {list(cfg.mean)}, std {list(cfg.std)}",
        "code": training.code,
    }
    if not training.figures:
        facts["accuracy"] = "not on record; `dattrain eval` of this folder measures it"
    return _list({key: str(value) for key, value in facts.items() if value})


def _usage(name: str) -> str:
    return (
        "```python\n"
        "import timm\n"
        "import dattrain.models  # registers the architecture\n\n"
        f'model = timm.create_model("local-dir:{name}", pretrained=True).eval()  # or "hf-hub:USER/{name}" once uploaded\n'
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)\n"
        "logits = model(transform(image)[None])  # image: a PIL image, RGB\n"
        'names = model.pretrained_cfg.get("label_names")\n'
        "```\n\n"
        f"`dattrain predict IMAGE --checkpoint {name}`, `dattrain eval {name} --data SET` and `init.from={name}` take the folder too.\n"
    )


def _list(facts: dict[str, str]) -> str:
    return "".join(f"- {key}: {value}\n" for key, value in facts.items())


def _set(spec: str | None) -> str:
    """A set or run by its own name: where it lay is nobody's business."""
    if not spec:
        return ""
    if spec.endswith(split_file.SUFFIX):
        try:
            spec = str(split_file.read(spec)[0])
        except UserError:
            return ""
    parts = [part for part in PurePosixPath(mask(spec).split("?")[0]).parts if not set(part) & set("*{[")]
    first = len(parts) - 1
    while first > 0 and parts[first] in _PLACES:
        first -= 1
    return "/".join(parts[max(first, 0) :]).strip("/")
