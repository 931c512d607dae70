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
from dattrain.observe import metrics
from dattrain.pretrained import class_names
from dattrain.pretrained.preprocess import padded_size
from dattrain.pretrained.pretrained_cfg import Network, PretrainedCfg
from dattrain.pretrained.weights import config_of
from dattrain.state.format import named
from dattrain.state.format.manifest import read_manifest
from dattrain.urls import mask

_PLACES = ("train", "training", "val", "validation", "test", "shards", "images")
"""Folders that every set has: not its name."""
NAMED = 30
"""Class names at most that the card lists; the metadata of the weights have all."""
_METRICS = {
    "top1": ("accuracy", "top-1 accuracy"),
    "top5": ("accuracy", "top-5 accuracy"),
    "miou": ("mean_iou", "mIoU"),
    "macc": ("mean_accuracy", "mean accuracy of classes"),
    "aacc": ("accuracy", "accuracy of pixels"),
    "ap": ("mean_average_precision", "box AP"),
    "ap50": ("mean_average_precision", "box AP50"),
    "mask_ap": ("mean_average_precision", "mask AP"),
    "mask_ap50": ("mean_average_precision", "mask AP50"),
}
"""Numbers of an evaluation that are stated: their type on the hub, and their name."""


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
    """Those of ``_METRICS`` that there are, in percent, of ``images`` images."""
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
    figures = {key: row[prefix + key] for key in _METRICS if row.get(prefix + key) is not None}
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


def text(model: Network, cfg: PretrainedCfg, training: Training, name: str) -> str:
    """The card.

    Args:
        name: of the folder, by which it is loaded.
    """
    title = _title(cfg)
    parts = [
        f"---\n{yaml.safe_dump(_front_matter(cfg, training, title), sort_keys=False)}---\n",
        f"# {title}\n",
        _about(cfg),
    ]
    dense = cfg.sides
    size = cfg.img_size if dense is None else padded_size(*dense, cfg)
    parts += [
        "## Architecture\n",
        _list(
            {
                "model" if dense is None else "backbone": f"`{cfg.name}`"
                + (f" with {_arguments(cfg)}" if cfg.overrides else ""),
                **_decoder(cfg),
                "image size": f"{size[0]} x {size[1]}" if dense is None else "any",
                "parameters": f"{flops.parameters(model) / 1e6:.2f} M",
                "multiply-adds": f"{flops.flops(model, size, cfg.in_chans) / 1e9:.3g} G per image"
                + ("" if dense is None else f" of {size[0]} x {size[1]}"),
                "classes": _classes(cfg),
            }
        ),
        "## Training and evaluation\n",
        _trained(cfg, training),
        "## How to load it\n",
        _usage(name) if dense is None else _usage_dense(name, cfg),
        "## License\n",
        "Not stated. Who publishes these weights chooses one that their data and the weights they began with allow, and adds it "
        "to the block at the top of this file: `license: ...`.\n",
        "## References\n",
        f"{'; '.join(_references(cfg))}.\n",
    ]  # fmt: skip
    return "\n".join(parts)


def _title(cfg: PretrainedCfg) -> str:
    """What the model is called: its architecture. Folders are called `out`, and recipes `recipe`."""
    dense = cfg.detection or cfg.segmentation
    return cfg.name if dense is None else f"{cfg.name} with {_HEADS[dense.head]}"


def _front_matter(cfg: PretrainedCfg, training: Training, title: str) -> dict[str, Any]:
    task, library = {
        "classification": ("image-classification", "timm"),
        "segmentation": ("image-segmentation", "dattrain"),
        "detection": ("object-detection", "dattrain"),
    }[cfg.task]
    found: dict[str, Any] = {
        "library_name": library,
        "pipeline_tag": task,
        "tags": [task, library, "deformable-attention"],
    }
    if training.figures:
        rows = [
            {"type": kind, "name": said, "value": round(training.figures[key], 3)}
            for key, (kind, said) in _METRICS.items()
            if key in training.figures
        ]
        result = {
            "task": {"type": task},
            "dataset": {"type": "other", "name": training.val or "the run's validation set"},
            "metrics": rows,
        }
        found["model-index"] = [{"name": title, "results": [result]}]
    return found


def _about(cfg: PretrainedCfg) -> str:
    kind = "DAT++" if "pp" in cfg.name else "DAT, a Vision Transformer with Deformable Attention"
    if not cfg.name.startswith("dat_"):
        kind = f"`{cfg.name}`"
    origin = f" ({cfg.source})" if cfg.source else ""
    task = "An image classifier" if cfg.num_classes else "A backbone without classification head"
    if cfg.segmentation is not None:
        task, kind = "A semantic segmentation network", f"{_HEADS[cfg.segmentation.head]} on {kind}"
    if cfg.detection is not None:
        what = (
            "An object detection and instance segmentation"
            if "mask" in cfg.detection.head
            else "An object detection"
        )
        task, kind = f"{what} network", f"{_HEADS[cfg.detection.head]} on {kind}"
    return f"{task}: {kind}, trained with dattrain{origin}.\n"


_HEADS = {
    "upernet": "UperNet",
    "semantic_fpn": "Semantic FPN",
    "retinanet": "RetinaNet",
    "faster_rcnn": "Faster R-CNN",
    "mask_rcnn": "Mask R-CNN",
    "cascade_rcnn": "Cascade R-CNN",
    "cascade_mask_rcnn": "Cascade Mask R-CNN",
}
_PAPERS = {
    "upernet": "Unified Perceptual Parsing for Scene Understanding, Xiao et al., ECCV 2018 (arXiv 1807.10221)",
    "semantic_fpn": "Panoptic Feature Pyramid Networks, Kirillov et al., CVPR 2019 (arXiv 1901.02446)",
    "retinanet": "Focal Loss for Dense Object Detection, Lin et al., ICCV 2017 (arXiv 1708.02002)",
    "faster_rcnn": "Faster R-CNN, Ren et al., NeurIPS 2015 (arXiv 1506.01497)",
    "mask_rcnn": "Mask R-CNN, He et al., ICCV 2017 (arXiv 1703.06870)",
    "cascade_rcnn": "Cascade R-CNN: Delving into High Quality Object Detection, Cai and Vasconcelos, CVPR 2018 (arXiv 1712.00726)",
    "cascade_mask_rcnn": "Cascade R-CNN: High Quality Object Detection and Instance Segmentation, Cai and Vasconcelos, TPAMI 2019 (arXiv 1906.09756)",
}
_NORMS = {"sync": "SyncBatchNorm", "batch": "BatchNorm", "group": "GroupNorm"}


def _references(cfg: PretrainedCfg) -> list[str]:
    found = []
    if cfg.name.startswith("dat_"):
        found.append("Vision Transformer with Deformable Attention, Xia et al., CVPR 2022 (arXiv 2201.00520)")
    if cfg.name.startswith("dat_pp_"):
        found.append(
            "DAT++: Spatially Dynamic Vision Transformer with Deformable Attention (arXiv 2309.01430)"
        )
    if cfg.name.startswith("swin_"):
        found.append("Swin Transformer, Liu et al., ICCV 2021 (arXiv 2103.14030)")
    if cfg.name.startswith("pvt_"):
        found.append(
            "PVT v2: Improved Baselines with Pyramid Vision Transformer, Wang et al., 2022 (arXiv 2106.13797)"
        )
    if (dense := cfg.detection or cfg.segmentation) is not None:
        found.append(_PAPERS[dense.head])
    return found


def _decoder(cfg: PretrainedCfg) -> dict[str, str]:
    if cfg.segmentation is not None:
        return {"decoder": f"`{cfg.segmentation.head}`, {_NORMS[cfg.segmentation.norm]}"}
    if cfg.detection is None:
        return {}
    head, norm = cfg.detection.head, _NORMS[cfg.detection.norm]
    return {"heads": f"`{head}`" + (f", {norm} in the box heads" if head.startswith("cascade") else "")}


def _arguments(cfg: PretrainedCfg) -> str:
    return ", ".join(f"`{key}={value}`" for key, value in (cfg.overrides or {}).items())


def _classes(cfg: PretrainedCfg) -> str:
    names = class_names.names(cfg.num_classes, cfg.labels, cfg.classes)
    if not cfg.classes and not cfg.labels:
        return f"{cfg.num_classes}, whose names are not known"
    where = (
        "`label_names` in config.json" if cfg.task == "classification" else "in the metadata of the weights"
    )
    more = f" and {len(names) - NAMED} more ({where})" if len(names) > NAMED else ""
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
            said.removesuffix(
                " accuracy"
            ): f"{training.figures[key]:.2f} % of {training.figures['images']:,} images"
            for key, (_, said) in _METRICS.items()
            if key in training.figures
        },
        "preparation of images": f"{_prepared(cfg)}, {cfg.interpolation}, mean {list(cfg.mean)}, std {list(cfg.std)}",
        "code": training.code,
    }
    if not training.figures:
        metric = {"classification": "accuracy", "segmentation": "mIoU", "detection": "AP"}[cfg.task]
        facts[metric] = "not on record; `dattrain eval` of this folder measures it"
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


def _prepared(cfg: PretrainedCfg) -> str:
    if cfg.sides is None:
        how = "squashed" if cfg.resize == "squash" else "shorter side resized"
        return f"{how}, central crop of {cfg.crop_pct:g}"
    found, dense = (
        f"shorter side resized to {cfg.sides[0]}, the longer at most {cfg.sides[1]}",
        cfg.segmentation,
    )
    if dense is None:
        assert cfg.detection is not None
        return f"{found}, both padded to multiples of {cfg.detection.pad_to}"
    if dense.mode == "slide" and dense.crop is not None:
        found += f", in windows of {dense.crop[0]} x {dense.crop[1]}"
    if dense.scales != (1.0,):
        found += f", at scales {', '.join(f'{scale:g}' for scale in dense.scales)}"
    return found + (", and mirrored" if dense.flip else "")


def _usage_dense(name: str, cfg: PretrainedCfg) -> str:
    if cfg.detection is not None:
        gives = (
            "found.boxes, found.scores, found.classes  # left, top, right, bottom in pixels; numbers of found.names\n"
            + ("found.masks  # N x H x W bool\n" if "mask" in cfg.detection.head else "")
            + "found.overlay()  # the picture with all of it\n"
        )
    else:
        gives = (
            "found.classes  # H x W uint8, the number of each pixel's class in found.names\n"
            "found.shares()  # the classes that are there, with their shares of the pixels\n"
        )
    return (
        "```python\n"
        "import dattrain\n\n"
        f'(found,) = dattrain.predict("{name}", "photo.jpg")\n'
        f"{gives}"
        "```\n\n"
        f"`dattrain predict IMAGE --checkpoint {name}`, `dattrain eval {name} --data SET` and `init.from={name}/model.safetensors` "
        "take it too.\n"
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
