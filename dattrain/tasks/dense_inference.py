"""From an image to a class for every pixel: the whole image or windows of it, at several scales, and mirrored.

The rules are mmsegmentation's (0.29): ``whole_inference``, ``slide_inference`` and ``aug_test`` of its ``EncoderDecoder``, and
``MultiScaleFlipAug``. What differs is that scores are laid out for a few classes at a time, so that a photograph of twelve
million pixels and 150 classes does not take 7 GB for each scale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dattrain.config.schema import Config
from dattrain.config.values import as_pair
from dattrain.data.augment.dense_plan import resized_size
from dattrain.data.augment.dense_transforms import resize
from dattrain.data.augment.mixup import Normalize
from dattrain.tasks.base import Forward

CLASSES = 16
"""Whose scores are laid out at full size at a time."""
WINDOWS = 8
"""That a call of the model takes at a time; under ZeRO-3 one call takes all of a scale, so that every rank calls as often."""


@dataclass(frozen=True)
class View:
    """Logits of one image at one scale, as the model gave them: N x K x h x w of N windows."""

    logits: Tensor
    corners: tuple[tuple[int, int], ...]
    """Top and left of each window."""
    window: tuple[int, int]
    """Height and width of each."""
    size: tuple[int, int]
    """Of the image at this scale."""
    mirrored: bool = False
    """Left to right; ``at`` turns it back."""

    def at(self, classes: slice, size: tuple[int, int]) -> Tensor:
        """Logits of some classes at another size, C x H x W float32: windows averaged where they overlap, bilinear."""
        values = _bilinear(self.logits[:, classes].float(), self.window)
        if len(self.corners) > 1:
            total = values.new_zeros(values.shape[1], *self.size)
            times = values.new_zeros(1, *self.size)
            for (top, left), each in zip(self.corners, values):
                place = slice(None), slice(top, top + self.window[0]), slice(left, left + self.window[1])
                total[place] += each
                times[place] += 1
            values = (total / times)[None]
        found = _bilinear(values, size)[0]
        return found.flip(2) if self.mirrored else found


@dataclass(frozen=True)
class Decision:
    """What the views of an image come to, at its own size."""

    classes: Tensor
    """H x W uint8."""
    confidence: Tensor
    """H x W float32: the class's probability."""
    loss: Tensor | None
    """H x W float32: minus the logarithm of the true class's probability, 0 where there is none; None without truth."""


class Inference:
    """The views that ``eval`` asks for.

    Args:
        config: ``eval.{mode,stride,scales,flip}``, ``geometry``, ``augment.{mean,std,interpolation}``.
        dtype: of the model's input.
    """

    def __init__(self, config: Config, dtype: torch.dtype) -> None:
        self._config, self._dtype = config, dtype
        self._normalize = Normalize(config.augment)

    def views(self, forward: Forward, image: Tensor, *, lockstep: bool = False) -> list[View]:
        """Run the model on an image (3 x H x W uint8, at its own size).

        Args:
            forward: the model, in evaluation mode.
            lockstep: one call for each scale, whatever the image's size, as ``nothing`` has them.
        """
        geometry, eval_ = self._config.geometry, self._config.eval
        found = []
        for scale in eval_.scales:
            size = resized_size(
                *image.shape[1:], short_side=geometry.short_side, long_side=geometry.long_side, scale=scale
            )
            window, corners = size, [(0, 0)]
            if eval_.mode == "slide":
                assert geometry.crop is not None  # refused by the schema
                crop = as_pair(geometry.crop)
                stride = stride_of(crop, eval_.stride)
                window = min(size[0], crop[0]), min(size[1], crop[1])
                corners = window_corners(size, window, stride)
            pixels = self._normalize(resize(image, size, self._config.augment.interpolation)[None])
            ways = [pixels, pixels.flip(3)] if eval_.flip else [pixels]
            cut = torch.cat(
                [way[:, :, t : t + window[0], l : l + window[1]] for way in ways for t, l in corners]
            )
            pieces = [cut] if lockstep else cut.split(WINDOWS)
            logits = torch.cat([forward(self._input(piece)) for piece in pieces])
            for number, each in enumerate(logits.split(len(corners))):
                found.append(View(each, tuple(corners), window, size, number == 1))
        return found

    def nothing(self, forward: Forward, device: torch.device) -> None:
        """Call the model as often as ``views`` in lockstep, where a rank has no image but the others do."""
        size = as_pair(self._config.model.img_size)
        for _ in self._config.eval.scales:
            forward(self._input(torch.zeros(1, 3, *size, device=device)))

    def _input(self, images: Tensor) -> Tensor:
        kind = torch.channels_last if self._config.train.channels_last else torch.contiguous_format
        return images.to(self._dtype, memory_format=kind)


def stride_of(crop: tuple[int, int], stride: int | tuple[int, int] | None) -> tuple[int, int]:
    """Rows and columns between windows: ``eval.stride``, or two thirds of the window."""
    return (max(1, crop[0] * 2 // 3), max(1, crop[1] * 2 // 3)) if stride is None else as_pair(stride)


def window_corners(
    size: tuple[int, int], window: tuple[int, int], stride: tuple[int, int]
) -> list[tuple[int, int]]:
    """Top and left of the windows over an image, row by row; the last ones end where the image does."""
    tops, lefts = (
        [min(step * number, side - extent) for number in range(-(-(side - extent) // step) + 1)]
        for side, extent, step in zip(size, window, stride)
    )
    return [(top, left) for top in tops for left in lefts]


def decide(views: Sequence[View], size: tuple[int, int], truth: Tensor | None = None) -> Decision:
    """The class of the largest logit; of several views that of the largest mean probability.

    Args:
        size: height and width of the result: the image's own.
        truth: H x W uint8 for ``Decision.loss``; a class's number, or one from the number of classes on.
    """
    if len(views) == 1:
        best, classes, own, total = _scan(lambda some: views[0].at(some, size), views[0], truth)
        return Decision(classes, (best - total).exp(), _loss(own, total, truth, views[0]))
    totals = [_scan(lambda some, v=view: v.at(some, size), view, None)[3] for view in views]  # type: ignore[misc]

    def mean(some: slice) -> Tensor:
        probability = sum((view.at(some, size) - total).exp_() for view, total in zip(views, totals))
        assert isinstance(probability, Tensor)
        return (probability / len(views)).log_()

    best, classes, own, _ = _scan(mean, views[0], truth)
    return Decision(classes, best.exp(), _loss(own, torch.zeros_like(best), truth, views[0]))


def _scan(
    scores: Callable[[slice], Tensor], view: View, truth: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Over all classes, a few at a time: the best score, its class, the true class's score, and log of the sum of exp."""
    count = view.logits.shape[1]
    best = index = own = total = torch.empty(0)
    for first in range(0, count, CLASSES):
        some = scores(slice(first, min(first + CLASSES, count)))
        top, at = some.max(0)
        at += first
        sums = some.logsumexp(0)
        if first == 0:
            best, index, total, own = top, at, sums, torch.zeros_like(top)
        else:
            # The first of equals, as argmax.
            index = torch.where(top > best, at, index)
            best, total = torch.maximum(top, best), torch.logaddexp(total, sums)
        if truth is not None:
            within = truth.long() - first
            picked = some.gather(0, within.clamp(0, len(some) - 1)[None])[0]
            own = torch.where((within >= 0) & (within < len(some)), picked, own)
    return best, index.to(torch.uint8), own, total


def _loss(own: Tensor, total: Tensor, truth: Tensor | None, view: View) -> Tensor | None:
    if truth is None:
        return None
    return torch.where(truth < view.logits.shape[1], total - own, 0.0)


def _bilinear(values: Tensor, size: tuple[int, int]) -> Tensor:
    """N x C x h x w at another size; as it is where it has that size."""
    if tuple(values.shape[2:]) == tuple(size):
        return values
    return F.interpolate(values, size=size, mode="bilinear", align_corners=False)
