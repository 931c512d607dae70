"""ImageNet's other test sets, recognised by how their folders are laid out: what to read, which classes count, which labels.

V2 (Recht et al. 2019): folders ``0`` to ``999``. A and R (Hendrycks et al. 2021): 200 synset folders; the other classes
get no probability, as their authors score it. Sketch (Wang et al. 2019): 1,000 synset folders. C (Hendrycks and Dietterich
2019): ``<corruption>/<severity>/<synset>``. ReaL (Beyer et al. 2020): the validation images under their own names, with
sets of right answers. Label lists are timm's.
"""

from __future__ import annotations

import json
import os
import pkgutil
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dattrain.data import labels
from dattrain.data.classes import few
from dattrain.errors import UserError
from dattrain.pretrained.pretrained_cfg import PretrainedCfg, classes_of
from dattrain.urls import plain

ALEXNET_ERROR = {
    "gaussian_noise": 88.6,
    "shot_noise": 89.4,
    "impulse_noise": 92.3,
    "defocus_blur": 82.0,
    "glass_blur": 82.6,
    "motion_blur": 78.6,
    "zoom_blur": 79.8,
    "snow": 86.7,
    "frost": 82.7,
    "fog": 81.9,
    "brightness": 56.5,
    "contrast": 85.3,
    "elastic_transform": 64.6,
    "pixelate": 71.8,
    "jpeg_compression": 60.7,
}
"""AlexNet's top-1 error in percent, mean over severities: the unit of mCE (Hendrycks and Dietterich 2019, table 1)."""


@dataclass(frozen=True)
class Part:
    """One folder or set of shards to evaluate. ``among``: classes of the model that count, None for all."""

    name: str
    path: str
    among: np.ndarray | None = None


def parts(kind: str | None, path: str, cfg: PretrainedCfg) -> list[Part]:
    """What there is to read for a test set at ``path``.

    Raises:
        UserError: the folders are not laid out as that set's are, or the model's classes cannot hold them.
    """
    if kind in (None, "real"):
        return [Part(kind or Path(plain(path)).name or path, path)]
    if kind not in labels.TEST_SETS:
        raise UserError(f"--labels {kind}: choose one of {', '.join(labels.TEST_SETS)}")
    if not os.path.isdir(path):
        raise UserError(f"{path}: --labels {kind} needs the folder of that set")
    if kind == "imagenet-c":
        return [
            Part(f"{corruption}/{severity.name}", str(severity))
            for corruption in _corruptions(path)
            for severity in _folders(Path(path) / corruption)
        ]
    found = [folder.name for folder in _folders(Path(path))]
    if kind == "imagenet-v2":
        if sorted(found) != sorted(map(str, range(1000))):
            raise UserError(f"{path}: ImageNet-V2 has the folders 0 to 999, this one {_few(found)}")
        _check_imagenet(cfg, f"{path}: ImageNet-V2")
        return [Part(kind, path)]
    sketch = kind == "imagenet-sketch"
    expected = list(_imagenet() if sketch else labels.packaged(f"imagenet_{kind[-1]}_synsets.txt"))
    if set(found) - set(expected):
        raise UserError(f"{path}: {_few(sorted(set(found) - set(expected)))} are no synsets of {kind}")
    among = None if sketch else outputs_of(expected, cfg)
    return [Part(kind, path, among)]


def outputs_of(synsets: list[str], cfg: PretrainedCfg) -> np.ndarray:
    """The model's output for each synset. Raises UserError where it lacks one, or its classes are unknown."""
    return classes_of(cfg).numbers(synsets, "the test set")


def _check_imagenet(cfg: PretrainedCfg, what: str) -> None:
    """Refuse a model whose outputs are not ImageNet-1K's classes in their usual order, which a test set's numbers mean."""
    names = classes_of(cfg).names
    if cfg.num_classes != 1000:
        raise UserError(f"{what} numbers ImageNet-1K's classes; the model has {cfg.num_classes} classes")
    if names and names != _imagenet():
        raise UserError(
            f"{what} numbers ImageNet-1K's synsets, and the model's 1000 classes are others, in another order, or not called by "
            f"synset ({few(names)})"
        )


def real_answers(keys: list[str], cfg: PretrainedCfg) -> list[frozenset[int]]:
    """ReaL's right answers for each validation image, by its name; empty where its annotators found none.

    Raises:
        UserError: the model is not ImageNet-1K's, or a name is not ``ILSVRC2012_val_00000001`` to ``_00050000``.
    """
    _check_imagenet(cfg, "ReaL")
    data = pkgutil.get_data("timm.data", "_info/imagenet_real_labels.json")
    if data is None:
        raise UserError("timm does not hold ReaL's labels; install timm 1.0.20 or newer")
    answers = json.loads(data)
    out = []
    for key in keys:
        match = re.search(r"ILSVRC2012_val_(\d{8})", key)
        if not match or not 1 <= int(match[1]) <= len(answers):
            raise UserError(
                f"{key}: --labels real needs the validation images under their own names (ILSVRC2012_val_...)"
            )
        out.append(frozenset(answers[int(match[1]) - 1]))
    return out


def corruption_table(top1: dict[str, float]) -> list[dict[str, float | str]]:
    """Per corruption: mean top-1 over severities, and its error relative to AlexNet's (NaN for one that has none).

    Args:
        top1: by ``corruption/severity``, percent.
    """
    rows: list[dict[str, float | str]] = []
    for corruption in dict.fromkeys(name.split("/")[0] for name in top1):
        accuracy = float(np.mean([value for name, value in top1.items() if name.split("/")[0] == corruption]))
        unit = ALEXNET_ERROR.get(corruption, float("nan"))
        rows.append({"corruption": corruption, "top1": accuracy, "ce": 100 * (100 - accuracy) / unit})
    return rows


def mean_corruption_error(rows: list[dict[str, float | str]]) -> float:
    """Mean corruption error (mCE) in percent; NaN unless all fifteen corruptions are there."""
    ce = {str(row["corruption"]): float(row["ce"]) for row in rows}
    if not ALEXNET_ERROR.keys() <= ce.keys():
        return float("nan")
    return float(np.mean([ce[name] for name in ALEXNET_ERROR]))


def _corruptions(path: str) -> list[str]:
    found = [folder.name for folder in _folders(Path(path))]
    for name in found:
        inside = [folder.name for folder in _folders(Path(path) / name)]
        if not inside or not all(each in "12345" and len(each) == 1 for each in inside):
            raise UserError(f"{path}/{name}: ImageNet-C has severities 1 to 5 there, this one {_few(inside)}")
    if not found:
        raise UserError(f"{path}: has no corruptions")
    return found


def _folders(path: Path) -> list[Path]:
    return sorted(each for each in path.iterdir() if each.is_dir() and not each.name.startswith("."))


def _imagenet() -> tuple[str, ...]:
    return labels.label_set("imagenet-1k").synsets


def _few(names: list[str]) -> str:
    return few(names) or "none"
