"""The objects of images, by a detector."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dattrain.data.annotations import rle
from dattrain.drawing import Shape, draw
from dattrain.errors import ConfigError, UserError
from dattrain.models.dense.detector import Detector
from dattrain.pretrained import class_names, preprocess
from dattrain.pretrained.pretrained_cfg import NETWORKS, Network, PretrainedCfg
from dattrain.pretrained.recipe_model import dense_recipe
from dattrain.tasks.detected_images import SCORE
from dattrain.tasks.detection_inference import DetectionInference, Pasted, paste
from dattrain.text import shortened


class Found(NamedTuple):
    """An object of an image. ``box`` is its left, top, right and bottom edge in pixels; ``number`` its class's, from 0."""

    name: str
    score: float
    number: int
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class Detection:
    """What an image shows where: N objects, the surest first.

    Attributes:
        pixels: H x W x 3 uint8 RGB: the image, upright.
        boxes: N x 4 float32: left, top, right and bottom edge in pixels of the image.
        scores: N float32, 0 to 1.
        classes: N int64, the number of each object's class.
        names: of all classes, by number.
        probabilities: N x G x G float32: of each object's mask over its box; None by a detector of boxes alone.
    """

    pixels: NDArray[np.uint8]
    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    classes: NDArray[np.int64]
    names: tuple[str, ...]
    probabilities: NDArray[np.float32] | None

    def __len__(self) -> int:
        return len(self.scores)

    def __repr__(self) -> str:
        height, width = self.pixels.shape[:2]
        shown = ", ".join(f"{each.name} {each.score:.0%}" for each in self.objects()[:5])
        more = f" and {len(self) - 5} more" if len(self) > 5 else ""
        return f"Detection({height} x {width}: {shown or 'nothing'}{more})"

    def objects(self) -> list[Found]:
        """The objects one by one."""
        return [
            Found(self.names[number], score, number, (box[0], box[1], box[2], box[3]))
            for number, score, box in zip(self.classes.tolist(), self.scores.tolist(), self.boxes.tolist())
        ]

    def counts(self) -> str:
        """How many of which class there are, as ``3 person, 1 dog``, the most frequent first."""
        found = Counter(each.name for each in self.objects()).most_common()
        return ", ".join(f"{count} {name}" for name, count in found)

    @property
    def masks(self) -> NDArray[np.bool_] | None:
        """N x H x W: the pixels of each object, laid out when they are asked for; None by a detector of boxes alone."""
        if self.probabilities is None:
            return None
        size = self.pixels.shape[0], self.pixels.shape[1]
        found = [self._pasted(number).at(size).numpy() for number in range(len(self))]
        return np.stack(found) if found else np.zeros((0, size[0], size[1]), np.bool_)

    def areas(self) -> list[float]:
        """Pixels of each object, of its mask or else of its box."""
        if self.probabilities is not None:
            return [float(self._pasted(number).pixels.sum()) for number in range(len(self))]
        sides = self.boxes[:, 2:] - self.boxes[:, :2]
        return [round(float(area), 3) for area in sides.prod(1)]

    def covered(self) -> NDArray[np.bool_]:
        """H x W: the pixels of any object, of its mask or else of its box."""
        size = self.pixels.shape[0], self.pixels.shape[1]
        inside = np.zeros(size, np.bool_)
        for number, (left, top, right, bottom) in enumerate(self.boxes.tolist()):
            if self.probabilities is not None:
                inside |= self._pasted(number).at(size).numpy()
            else:
                inside[max(0, round(top)) : round(bottom), max(0, round(left)) : round(right)] = True
        return inside

    def best(self, count: int | None) -> Detection:
        """So many of the surest objects at most; None for all."""
        masks = None if self.probabilities is None else self.probabilities[:count]
        return Detection(
            self.pixels, self.boxes[:count], self.scores[:count], self.classes[:count], self.names, masks
        )

    def overlay(self, *, text: bool = True, longest: int = 1) -> NDArray[np.uint8]:
        """The image with boxes, masks, and the objects' names and scores (``text``), H x W x 3 uint8 RGB.

        An image of which both sides are below ``longest`` pixels is enlarged, by a whole number, until one is not: letters
        cannot be as small as their objects.
        """
        factor = -(-longest // max(self.pixels.shape[:2]))
        large = self if factor <= 1 else self._enlarged(factor)
        return draw(large.pixels, large._shapes(), text=text)

    def coco(self, image_id: int | str, category_ids: Sequence[int]) -> list[dict[str, Any]]:
        """The objects as COCO's results are written: ``bbox`` x, y, width and height; masks as compressed run lengths.

        Args:
            image_id: of the image.
            category_ids: of the classes, by number.
        """
        size = self.pixels.shape[0], self.pixels.shape[1]
        rows = []
        for number, found in enumerate(self.objects()):
            left, top, right, bottom = found.box
            row: dict[str, Any] = {
                "image_id": image_id,
                "category_id": category_ids[found.number],
                "bbox": [round(each, 3) for each in (left, top, right - left, bottom - top)],
                "score": round(found.score, 6),
            }
            if self.probabilities is not None:
                mask = self._pasted(number).at(size).numpy()
                row["segmentation"] = {"size": list(size), "counts": rle.to_string(rle.encode(mask))}
            rows.append(row)
        return rows

    def _enlarged(self, factor: int) -> Detection:
        height, width = self.pixels.shape[:2]
        resized = Image.fromarray(self.pixels).resize(
            (factor * width, factor * height), Image.Resampling.BICUBIC
        )
        return replace(self, pixels=np.asarray(resized), boxes=self.boxes * np.float32(factor))

    def _shapes(self) -> Iterator[Shape]:
        for number, found in enumerate(self.objects()):
            text = f"{shortened(found.name)} {found.score:.0%}"
            if self.probabilities is None:
                yield Shape(found.box, found.number, text)
            else:
                pasted = self._pasted(number)
                yield Shape(found.box, found.number, text, pasted.pixels.numpy(), (pasted.top, pasted.left))

    def _pasted(self, number: int) -> Pasted:
        assert self.probabilities is not None
        height, width = self.pixels.shape[:2]
        probability, box = torch.from_numpy(self.probabilities[number]), torch.from_numpy(self.boxes[number])
        return paste(probability, box, (height, width))


def detect(
    model: Network,
    cfg: PretrainedCfg,
    images: Sequence[str | Path | Image.Image | np.ndarray | Tensor],
    *,
    names: Sequence[str] | None = None,
    score_threshold: float = SCORE,
) -> Iterator[Detection]:
    """Find the objects of images, prepared as the weights want them; each is run alone.

    Args:
        model: a detector in evaluation mode, as ``load_model`` gives it, on the device that is to be used.
        cfg: as ``load_model`` gives it beside the model.
        images: files and PIL images, turned as their EXIF orientation says; arrays uint8 (H x W, or H x W x 3, RGB) or tensors
            uint8 (3 x H x W). Of any sizes.
        names: of the classes, in the order of the head; None takes those of the weights, else ``class 7``.
        score_threshold: least score of an object, 0 to 1. Below .3 most are none; evaluation counts from ``eval.score_threshold`` on.

    Yields:
        One for each image, when it is asked for.

    Raises:
        ConfigError: another network than a detector, or a score that is none.
        UserError: a file that cannot be read as an image, or weights that take other images than of three channels.
    """
    if not isinstance(model, Detector):
        raise ConfigError(f"{cfg.source or cfg.name}: is {NETWORKS[cfg.task]}, not a detector")
    check_score(score_threshold, "score_threshold")
    if cfg.in_chans != 3:
        raise UserError(f"this model takes {cfg.in_chans} channels, and an image file gives 3")
    known = tuple(names or class_names.names(cfg.num_classes, cfg.labels, cfg.classes))
    device = next(model.parameters()).device
    inference = DetectionInference(dense_recipe(cfg), torch.float32)
    for image in images:
        pixels = preprocess.as_pixels(image, upright=True)
        with torch.inference_mode(), _scores_from(model, score_threshold):
            found = inference(model, pixels.to(device)).above(score_threshold)
        yield Detection(
            np.ascontiguousarray(preprocess.array(pixels)),
            found.boxes.cpu().numpy(),
            found.scores.cpu().numpy(),
            found.classes.cpu().numpy(),
            known,
            None if found.masks is None else found.masks.float().cpu().numpy(),
        )


def check_score(score: float, name: str) -> None:
    """Raise ConfigError, which calls it ``name``, where ``score`` cannot be the least of an object."""
    if not 0 <= score <= 1:
        raise ConfigError(f"{name} {score:g}: a score is from 0 to 1")


@contextmanager
def _scores_from(model: Detector, score: float) -> Iterator[None]:
    """Within the block, the detector gives what is of that score, where its own threshold is above."""
    own = model.score_threshold
    model.score_threshold = min(own, score)
    try:
        yield
    finally:
        model.score_threshold = own
