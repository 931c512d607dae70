"""What ``import dattrain`` offers to notebooks and scripts; the command line (``dattrain.cli``) calls the same libraries.

Everything runs in this process, and may be called again and again. Several ranks are started by ``dattrain train --nproc``,
torchrun or Slurm; each may call these functions then.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import yaml
from PIL import Image
from torch import Tensor

from dattrain.config.load import dump, load, loads
from dattrain.config.run import new_folder, resolve
from dattrain.config.schema import Config
from dattrain.errors import ConfigError, UserError
from dattrain.evaluation.evaluate import evaluate as evaluate_weights
from dattrain.evaluation.options import Options
from dattrain.models.dense.detector import Detector
from dattrain.models.dense.segmenter import Segmenter
from dattrain.observe import metrics
from dattrain.pretrained import preprocess
from dattrain.pretrained.detect import Detection, check_score, detect
from dattrain.pretrained.predict import Prediction
from dattrain.pretrained.predict import predict as predict_with
from dattrain.pretrained.pretrained_cfg import NETWORKS, Network, PretrainedCfg
from dattrain.pretrained.segment import Segmentation, segment
from dattrain.pretrained.weights import load_model
from dattrain.report import training
from dattrain.state.format.retention import best_step
from dattrain.submit import history
from dattrain.tasks.detected_images import SCORE

Images = (
    str | Path | Image.Image | np.ndarray | Tensor | Sequence[str | Path | Image.Image | np.ndarray | Tensor]
)
"""One image, or several: files, PIL images, arrays or tensors."""
OnBad = Literal["error", "skip"]
_BATCH = 16
"""Images that are classified at a time."""
log = logging.getLogger(__name__)

__all__ = ["Run", "evaluate", "load_model", "predict", "train"]


@dataclass(frozen=True)
class Run:
    """A run folder: what a training wrote, and its newest weights. It is a path (``os.PathLike``) too."""

    folder: Path

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        object.__setattr__(self, "folder", Path(folder))

    def __fspath__(self) -> str:
        return str(self.folder)

    @property
    def config(self) -> Config:
        """The resolved recipe."""
        return load(self.folder / "config.yaml").config

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The rows of ``metrics.jsonl``, oldest first: ``loss``, ``lr`` ... of updates; ``top1``, ``eval_loss`` ... of evaluations."""
        return metrics.read(self.folder)

    @property
    def best(self) -> dict[str, Any] | None:
        """The evaluation that is best by ``checkpoint.metric``, the newest of equals; None before there is one."""
        metric = self.config.checkpoint.metric
        rows = [row for row in self.metrics if metrics.scores([row], metric)]
        best = best_step(metrics.scores(rows, metric), metric) if rows else None
        return next((row for row in rows if row["step"] == best), None)

    def evaluate(self, **options: Any) -> dict[str, Any]:
        """Evaluate the newest weights; see ``dattrain.evaluate``."""
        return evaluate(self, **options)

    def predict(
        self,
        images: Images,
        *,
        topk: int | None = None,
        score: float | None = None,
        device: str | torch.device | None = None,
        on_bad: OnBad = "error",
    ) -> list[list[Prediction] | None] | list[Segmentation | None] | list[Detection | None]:
        """Classify or segment images, or find their objects, with the newest weights; see ``dattrain.predict``."""
        return predict(self, images, topk=topk, score=score, device=device, on_bad=on_bad)

    def load_model(self, **options: Any) -> tuple[Network, PretrainedCfg]:
        """Open the newest weights; see ``dattrain.load_model``."""
        return load_model(self.folder, **options)


def train(
    recipe: str | os.PathLike[str] | Mapping[str, Any] | Config,
    *,
    run: str | os.PathLike[str] | None = None,
    **settings: Any,
) -> Run:
    """Train a recipe, or resume a run, to its end.

    Args:
        recipe: the name of a shipped recipe (``dattrain config list``), a file, a run folder, a mapping of sections, or a
            ``Config``.
        run: the run folder; one that is there is resumed. None makes ``runs/<recipe>-<time>``.
        settings: settings over the recipe's by their dotted keys: ``**{"train.max_steps": 2}``.

    Returns:
        The run; it has ended early where a signal or its ``stop`` file asked for that, and resumes when it is trained again.

    Raises:
        ConfigError: the recipe or a setting cannot be used.
        UserError: data, disk, or a run that yields no finite updates any more.
    """
    overrides = _plain(settings)
    folder = None if run is None else Path(run)
    if isinstance(recipe, (Mapping, Config)):
        text = dump(recipe) if isinstance(recipe, Config) else yaml.safe_dump(_plain(recipe))
        config = loads(text, overrides, source="the recipe").config
        folder = folder or new_folder(config.name, os.environ)
    else:
        config, folder = resolve(os.fspath(recipe), overrides, folder, os.environ)
    training.train(config, folder, history.history)
    return Run(folder)


def evaluate(
    weights: str | os.PathLike[str], *, device: str | torch.device | None = None, **options: Any
) -> dict[str, Any]:
    """Evaluate weights: accuracy in percent (``top1``, ``top5``, with ``top1_low`` and ``top1_high``), ``loss``, calibration, speed.

    Of a segmentation network ``miou``, ``macc`` and ``aacc`` in percent, ``loss``, speed, and ``per_class``: a row with ``name``,
    ``iou``, ``accuracy`` and ``pixels`` for each class.

    Of a detector COCO's twelve numbers in percent (``ap``, ``ap50``, ..., ``ar_large``), those of the masks under ``mask_``, speed, and
    ``per_class``: a row with ``name``, ``objects``, ``ap`` and ``ap50`` for each class.

    Args:
        weights: a run, its folder, a checkpoint or a weights file.
        device: None takes a GPU where there is one.
        options: fields of ``dattrain.evaluation.options.Options``: ``data``, ``img_size``, ``batch``, ``knn``, ``scales`` ...

    Raises:
        ConfigError: options that do not go together, or are of another task.
        UserError: weights or images that cannot be read.
    """
    known = [field.name for field in fields(Options)]
    if unknown := [name for name in options if name not in known]:
        near = get_close_matches(unknown[0], known, 1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
        raise ConfigError(f"evaluate has no option {unknown[0]}; {hint}")
    return evaluate_weights(Path(weights), Options(**_plain(options)), device=device).report


def predict(
    weights: str | os.PathLike[str],
    images: Images,
    *,
    topk: int | None = None,
    score: float | None = None,
    device: str | torch.device | None = None,
    on_bad: OnBad = "error",
) -> list[list[Prediction] | None] | list[Segmentation | None] | list[Detection | None]:
    """Classify images: for each its ``topk`` most likely classes as (name, probability, number), the most likely first.

    By a segmentation network a ``Segmentation`` for each: ``classes``, a number for every pixel, ``shares()`` of the image by class,
    and ``overlay()``, the image in their colours. By a detector a ``Detection``: ``boxes``, ``scores``, ``classes`` and ``masks`` of its
    objects, the surest first, and ``overlay()``, the image with them.

    Args:
        weights: a run, its folder, a checkpoint or a weights file.
        images: a file or a folder of them, in the order of their names; a PIL image, an array uint8 H x W x 3 or a tensor uint8
            3 x H x W; or a sequence of such.
        topk: a classifier's, 5 where it is not given; of a detector the most objects of an image.
        score: of a detector the least score of an object, 0 to 1; .3 where it is not given.
        device: None takes a GPU where there is one.
        on_bad: ``error`` ends at the first image that cannot be read, without the results of those before it; ``skip`` says it in the
            log and has None in its place, so that results stay beside their images.

    Raises:
        ConfigError: ``topk`` for a segmentation network, ``score`` for another network than a detector; another ``on_bad``.
        UserError: weights or (but for ``skip``) images that cannot be read, or weights without classes.
    """
    if on_bad not in get_args(OnBad):
        raise ConfigError(f"predict has no on_bad={on_bad!r}; choose {' or '.join(get_args(OnBad))}")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model, cfg = load_model(Path(weights), device=device)
    many: Sequence[str | Path | Image.Image | np.ndarray | Tensor]
    if isinstance(images, (str, Path)):
        many = preprocess.find([Path(images)])
    elif not isinstance(images, Iterable) or (isinstance(images, (np.ndarray, Tensor)) and images.ndim < 4):
        many = [images]
    else:
        many = list(images)
    if score is not None and not isinstance(model, Detector):
        raise ConfigError(f"{weights}: score is for detectors, and this is {NETWORKS[cfg.task]}")
    if isinstance(model, Detector):
        least = SCORE if score is None else score
        check_score(least, "score")
        return [
            None if pixels is None else next(detect(model, cfg, [pixels], score_threshold=least)).best(topk)
            for pixels in _pixels(many, on_bad, upright=True)
        ]
    if isinstance(model, Segmenter):
        if topk is not None:
            raise ConfigError(
                f"{weights}: topk is for image classifiers and detectors, and this is a segmentation network"
            )
        return [
            None if pixels is None else next(segment(model, cfg, [pixels]))
            for pixels in _pixels(many, on_bad, upright=True)
        ]
    found: list[list[Prediction] | None] = []
    for first in range(0, len(many), _BATCH):
        batch = list(_pixels(many[first : first + _BATCH], on_bad))
        good = [pixels for pixels in batch if pixels is not None]
        classes = iter(predict_with(model, cfg, good, topk=5 if topk is None else topk, batch=_BATCH))
        found += [None if pixels is None else next(classes) for pixels in batch]
    return found


def _pixels(
    images: Sequence[str | Path | Image.Image | np.ndarray | Tensor], on_bad: OnBad, *, upright: bool = False
) -> Iterator[Tensor | None]:
    """3 x H x W of each image; see ``on_bad`` of ``predict``."""
    for image in images:
        try:
            yield preprocess.as_pixels(image, upright=upright)
        except UserError as error:
            if on_bad == "error":
                raise UserError(f'{error}; on_bad="skip" goes on without it') from error
            log.warning("%s: skipped", error)
            yield None


def _plain(value: Any) -> Any:
    """``value`` with paths as text, and numpy's scalars and tuples as Python's numbers and lists, at any depth."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    return os.fspath(value) if isinstance(value, os.PathLike) else value
