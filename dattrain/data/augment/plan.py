"""The augmentation plan: everything random about a batch's images, drawn beforehand as small arrays on the CPU.

Both decoders carry out the same plan. A sample's draws are a function of (seed, stream, position) alone, where the
position holds the epoch and the place in it; so a run that resumes on another number of ranks, or on the other
decoder, sees the same crops.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dattrain.config.data_sections import Augment
from dattrain.data.augment import randaugment
from dattrain.data.philox import Stream, normal, uniform

_ATTEMPTS = 10
_ERASE_AREA = (0.02, 1 / 3)
_ERASE_ASPECT = (0.3, 1 / 0.3)
_GAMMA_ATTEMPTS = 8

REDUCING_GAP = 2
"""A crop may be reduced by 2, 4 or 8 before it is resized where that leaves at least so many times the output's pixels on each side.

The word is Pillow's (``Image.resize``, ``Image.thumbnail``, whose default is 2 too). What it changes: docs/benchmarks/decode-cpu.md.
"""


class Region(NamedTuple):
    """A crop in pixels of the file, and by how much it may be reduced before it is resized; ``factor`` divides the others."""

    top: int
    left: int
    height: int
    width: int
    factor: int


@dataclass(frozen=True)
class AugmentPlan:
    """The drawn augmentation of B samples for images of ``size``.

    Attributes:
        size: (height, width) of the network's input.
        interpolation: of crops and geometric operations, ``bicubic`` or ``bilinear``.
        fill: RGB of what geometric operations uncover, the mean colour.
        crop_ratio: limits of width / height of a crop, for the fallback of ``crop_box``.
        crop: B x 10 x 4 float64; per attempt the area as a fraction of the image, the ratio width / height, and two
            uniform draws that place it from the top and the left. ``crop_box`` turns them into pixels.
        flip: B bool, left to right, after the crop.
        ops: B x layers int8 of ``randaugment.Op``, after the flip. Layers may be 0.
        args: B x layers float64, in the units of ``randaugment.Op``.
        jitter: B x 3 float32, factors of brightness, contrast, saturation, after ``ops``; 1 leaves as it is.
        jitter_order: B x 3 int8, in which order they come.
        erase: B x 4 int32, (top, left, height, width) of the box that is erased after normalisation; height 0: none.
        erase_key: B int64 below 2**32, keys of the noise that fills it.
        erase_noise: whether the box is filled with normal noise, else with zeros (the mean colour).
        mix: N float32, weight of each of the first N samples in its own mixture with its partner; 1: none. The rows from N
            on are partners alone: they are decoded, and not trained on.
        mix_box: N x 4 int32, (top, left, height, width) that comes from the partner (cutmix); height 0: mixup.
        mix_partner: N int64, row of the partner.
    """

    size: tuple[int, int]
    interpolation: str
    fill: tuple[int, int, int]
    crop_ratio: tuple[float, float]
    crop: NDArray[np.float64]
    flip: NDArray[np.bool_]
    ops: NDArray[np.int8]
    args: NDArray[np.float64]
    jitter: NDArray[np.float32]
    jitter_order: NDArray[np.int8]
    erase: NDArray[np.int32]
    erase_key: NDArray[np.int64]
    erase_noise: bool
    mix: NDArray[np.float32]
    mix_box: NDArray[np.int32]
    mix_partner: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.flip)

    @cached_property
    def recoloured(self) -> NDArray[np.bool_]:
        """B bool: whether any operation or jitter falls on a sample."""
        found: NDArray[np.bool_] = (self.ops >= 0).any(1) | (self.jitter != 1).any(1)
        return found

    def region(self, sample: int, height: int, width: int) -> Region:
        """What is taken of ``sample``, an image of ``height`` x ``width``: its ``crop_box``, and a large one's edges on a grid.

        A function of these alone, whatever file holds the image and whoever decodes it.
        """
        box = crop_box(self.crop[sample], height, width, self.crop_ratio)
        return on_grid(box, reduction((box[2], box[3]), self.size), height, width)

    def without_mixing(self, bad: NDArray[np.bool_]) -> AugmentPlan:
        """The plan with those unmixed that are bad or have a bad partner, whose pixels must not enter a good one.

        ``bad`` is B bool.
        """
        hit = bad[: len(self.mix)] | bad[self.mix_partner]
        if not hit.any():
            return self
        return replace(
            self,
            mix=np.where(hit, np.float32(1), self.mix),
            mix_box=np.where(hit[:, None], np.int32(0), self.mix_box),
        )


@dataclass(frozen=True)
class Mates:
    """Who is mixed with whom among the samples of a micro-batch.

    Attributes:
        partner: N int64, row of each sample's partner; its own row where it has none.
        key: N int64, the position that keys the draw of each sample's group.
    """

    partner: NDArray[np.int64]
    key: NDArray[np.int64]


def mates(slots: NDArray[np.int64], start: int, stop: int, group: int) -> tuple[NDArray[np.int64], Mates]:
    """The positions that a micro-batch needs, and who is mixed with whom.

    Groups are ``group`` consecutive slots of the global batch, whoever trains on them; the i-th of a group is mixed with the
    i-th from its end, and the first one's position keys the draw. So pairs of neighbours are groups of two, and timm's
    ``batch`` mode is groups of its batch.

    Args:
        slots: global positions of a whole global batch, in its order (G int64); the last group may be shorter.
        start, stop: the slots that are trained on.
        group: samples of a group; 1 mixes nobody.

    Returns:
        The positions of ``slots[start:stop]``, then of those partners that lie outside of it.
    """
    own = np.arange(start, stop)
    first = own // group * group
    other = first + np.minimum(first + group, len(slots)) - 1 - own
    away = (other < start) | (other >= stop)
    partner = np.where(away, len(own) + np.cumsum(away) - 1, other - start)
    return np.concatenate((slots[own], slots[other[away]])), Mates(partner, slots[first])


def draw(
    config: Augment, seed: int, positions: ArrayLike, size: tuple[int, int], groups: Mates | None = None
) -> AugmentPlan:
    """Draw the plan of the samples at ``positions`` (B int64, global) for images of ``size`` (height, width).

    ``groups`` says who is mixed with whom, as ``mates`` gives it with ``positions``; None takes ``positions`` for a global batch.
    """
    at = np.asarray(positions, dtype=np.int64)
    if groups is None:
        _, groups = mates(at, 0, len(at), config.group)
    ops, args = _ops(config, seed, at)
    jitter, jitter_order = _jitter(config, seed, at)
    erase, erase_key = _erase(config, seed, at, size)
    mix, mix_box = _mix(config, seed, groups, size)
    return AugmentPlan(
        size=size,
        interpolation=config.interpolation,
        fill=fill_color(config),
        crop_ratio=config.crop_ratio,
        crop=_crop(config, seed, at),
        flip=uniform(seed, Stream.FLIP, at, 1)[:, 0] < config.hflip,
        ops=ops,
        args=args,
        jitter=jitter,
        jitter_order=jitter_order,
        erase=erase,
        erase_key=erase_key,
        erase_noise=config.erase_mode == "pixel",
        mix=mix,
        mix_box=mix_box,
        mix_partner=groups.partner,
    )


def fill_color(config: Augment) -> tuple[int, int, int]:
    """The mean colour as 8-bit RGB, as timm fills what geometric operations uncover."""
    red, green, blue = (min(255, round(255 * mean)) for mean in config.mean)
    return red, green, blue


def crop_box(
    attempts: NDArray[np.float64], height: int, width: int, ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Random resized crop (Szegedy et al. 2015) in pixels, as torchvision and timm define it.

    Args:
        attempts: 10 x 4, one sample's ``AugmentPlan.crop``; the first that fits is taken.
        height, width: of the image.
        ratio: limits of width / height, for the centred crop that is taken when none fits.

    Returns:
        top, left, height, width.
    """
    area = height * width
    # One by one: nearly always the first fits, and ten of numpy's small arrays cost more than the JPEG's header.
    for scale, aspect, down, right in attempts.tolist():
        cw, ch = round(math.sqrt(scale * area * aspect)), round(math.sqrt(scale * area / aspect))
        if 0 < cw <= width and 0 < ch <= height:
            return int(down * (height - ch + 1)), int(right * (width - cw + 1)), ch, cw
    ch, cw = height, width
    if width / height < ratio[0]:
        ch = min(height, max(1, round(width / ratio[0])))
    elif width / height > ratio[1]:
        cw = min(width, max(1, round(height * ratio[1])))
    return (height - ch) // 2, (width - cw) // 2, ch, cw


def reduction(crop: Sequence[int], size: Sequence[int]) -> int:
    """8, 4, 2 or 1: the most by which a crop may be reduced before it is resized to ``size``, both (height, width)."""
    room = min(side / (REDUCING_GAP * out) for side, out in zip(crop, size))
    return next((factor for factor in (8, 4, 2) if room >= factor), 1)


def on_grid(box: tuple[int, int, int, int], factor: int, height: int, width: int) -> Region:
    """``box`` (top, left, height, width) with each edge at the nearest multiple of ``factor`` within the image.

    So an image that is reduced by ``factor`` can be cropped between two of its pixels. An edge moves by half of ``factor``,
    a quarter of a pixel of the output at most; at the lower and right border, where the side is no multiple, by less than ``factor``.
    """
    if factor == 1:
        return Region(*box, 1)
    top, left, rows, columns = box
    y0, x0 = round(top / factor), round(left / factor)
    y1 = min(round((top + rows) / factor), height // factor)
    x1 = min(round((left + columns) / factor), width // factor)
    return Region(y0 * factor, x0 * factor, (y1 - y0) * factor, (x1 - x0) * factor, factor)


def eval_geometry(
    height: int, width: int, size: tuple[int, int], *, resize: str, crop_pct: float
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Size to which an image is resized for evaluation, and top and left of the central crop of ``size`` there.

    ``shorter`` scales the image until ``size / crop_pct`` just fits into it (rounding as torchvision does for square
    sizes); ``squash`` resizes both sides to ``size / crop_pct`` and so distorts, as the authors' evaluation did.
    """
    target = [math.floor(side / crop_pct) for side in size]
    if resize == "squash":
        new_h, new_w = target
    elif target[0] == target[1]:
        short = target[0]
        new_h, new_w = (
            (short, int(short * width / height)) if height <= width else (int(short * height / width), short)
        )
    else:
        scale = min(height / target[0], width / target[1])
        new_h, new_w = max(size[0], round(height / scale)), max(size[1], round(width / scale))
    return (new_h, new_w), (round((new_h - size[0]) / 2), round((new_w - size[1]) / 2))


def source_edges(
    sides: Sequence[int], resized: tuple[int, int], corner: tuple[int, int], size: tuple[int, int]
) -> tuple[tuple[float, float], tuple[float, float]]:
    """The part ``corner``, ``size`` of a resized image, in the pixels of the image before: (top, left), (bottom, right).

    Args:
        sides: height and width before.
        resized: height and width after.
    """
    scale = [side / new for side, new in zip(sides, resized)]
    top, left = (start * s for start, s in zip(corner, scale))
    bottom, right = (
        min((start + length) * s, side) for start, length, s, side in zip(corner, size, scale, sides)
    )
    return (top, left), (bottom, right)


def _crop(config: Augment, seed: int, at: NDArray[np.int64]) -> NDArray[np.float64]:
    u = uniform(seed, Stream.CROP, at, 4 * _ATTEMPTS).reshape(len(at), _ATTEMPTS, 4)
    low, high = config.crop_scale
    log_low, log_high = (math.log(r) for r in config.crop_ratio)
    u[..., 0] = low + u[..., 0] * (high - low)
    u[..., 1] = np.exp(log_low + u[..., 1] * (log_high - log_low))
    return u


def _ops(config: Augment, seed: int, at: NDArray[np.int64]) -> tuple[NDArray[np.int8], NDArray[np.float64]]:
    if config.randaugment is None:
        return np.zeros((len(at), 0), np.int8), np.zeros((len(at), 0), np.float64)
    return randaugment.draw(randaugment.parse(config.randaugment), seed, at)


def _jitter(
    config: Augment, seed: int, at: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.int8]]:
    if not config.color_jitter:
        return np.ones((len(at), 3), np.float32), np.tile(np.arange(3, dtype=np.int8), (len(at), 1))
    u = uniform(seed, Stream.JITTER, at, 6)
    low, high = max(0.0, 1.0 - config.color_jitter), 1.0 + config.color_jitter
    return (low + u[:, :3] * (high - low)).astype(np.float32), np.argsort(u[:, 3:], axis=1).astype(np.int8)


def _erase(
    config: Augment, seed: int, at: NDArray[np.int64], size: tuple[int, int]
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    u = uniform(seed, Stream.ERASE, at, 2 + 4 * _ATTEMPTS)
    height, width = size
    tries = u[:, 2:].reshape(len(at), _ATTEMPTS, 4)
    area = (_ERASE_AREA[0] + tries[..., 0] * (_ERASE_AREA[1] - _ERASE_AREA[0])) * height * width
    log_low, log_high = (math.log(r) for r in _ERASE_ASPECT)
    aspect = np.exp(log_low + tries[..., 1] * (log_high - log_low))
    h, w = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (h < height) & (w < width) & (h > 0) & (w > 0)
    box = np.stack(
        (np.floor(tries[..., 2] * (height - h + 1)), np.floor(tries[..., 3] * (width - w + 1)), h, w), axis=-1
    )
    first = fits.argmax(axis=1)
    chosen = box[np.arange(len(at)), first]
    erased = (u[:, 0] < config.erase_prob) & fits.any(axis=1)
    return np.where(erased[:, None], chosen, 0).astype(np.int32), np.floor(u[:, 1] * 2**32).astype(np.int64)


def _mix(
    config: Augment, seed: int, groups: Mates, size: tuple[int, int]
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Zhang et al., "mixup" (2018) and Yun et al., "CutMix" (2019) with timm's box and corrected weight: one draw a group."""
    if not config.mixes:
        return np.ones(len(groups.key), np.float32), np.zeros((len(groups.key), 4), np.int32)
    first, group = np.unique(groups.key, return_inverse=True)
    lam, box = _mix_of(config, seed, first, size)
    alone = groups.partner == np.arange(len(group))
    return np.where(alone, np.float32(1), lam[group]), np.where(alone[:, None], np.int32(0), box[group])


def _mix_of(
    config: Augment, seed: int, first: NDArray[np.int64], size: tuple[int, int]
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Weights (K float32) and boxes (K x 4 int32) of the groups keyed by ``first`` (K int64)."""
    gammas = 2 * (3 * _GAMMA_ATTEMPTS + 1)
    u = uniform(seed, Stream.MIX, first, 4 + 2 * gammas)
    both = config.mixup > 0 and config.cutmix > 0
    cut = u[:, 1] < config.mix_switch if both else np.full(len(first), config.cutmix > 0)
    lam_mixup = _beta(config.mixup, u[:, 4 : 4 + gammas])
    lam_cut = _beta(config.cutmix, u[:, 4 + gammas :])
    height, width = size
    side = np.sqrt(1.0 - lam_cut)
    h, w = np.floor(height * side), np.floor(width * side)
    y, x = np.floor(u[:, 2] * height), np.floor(u[:, 3] * width)
    top, bottom = np.clip(y - h // 2, 0, height), np.clip(y + (h + 1) // 2, 0, height)
    left, right = np.clip(x - w // 2, 0, width), np.clip(x + (w + 1) // 2, 0, width)
    box = np.stack((top, left, bottom - top, right - left), axis=1)
    box[box[:, 3] == 0] = 0
    lam_cut = 1.0 - box[:, 2] * box[:, 3] / (height * width)
    mixed = u[:, 0] < config.mix_prob
    lam = np.where(mixed, np.where(cut, lam_cut, lam_mixup), 1.0)
    return lam.astype(np.float32), np.where((mixed & cut)[:, None], box, 0).astype(np.int32)


def _beta(alpha: float, u: NDArray[np.float64]) -> NDArray[np.float64]:
    """Beta(alpha, alpha) from two gamma draws, whose logarithms are compared, since small alphas underflow."""
    if alpha <= 0:
        return np.ones(len(u))
    half = u.shape[1] // 2
    difference = _log_gamma_draw(alpha, u[:, half:]) - _log_gamma_draw(alpha, u[:, :half])
    return 1.0 / (1.0 + np.exp(np.clip(difference, -700.0, 700.0)))


def _log_gamma_draw(alpha: float, u: NDArray[np.float64]) -> NDArray[np.float64]:
    """Logarithm of a Gamma(alpha, 1) draw: Marsaglia and Tsang (2000) for alpha + 1, boosted down by u^(1/alpha).

    Of eight attempts the first that is accepted is taken; for alpha > 0 all eight fail with a chance below 1e-10,
    and then the distribution's mode is taken.
    """
    d = alpha + 1.0 - 1.0 / 3.0
    n = _GAMMA_ATTEMPTS
    x = normal(u[:, :n], u[:, n : 2 * n])
    v = (1.0 + x / math.sqrt(9.0 * d)) ** 3
    positive = np.where(v > 0, v, 1.0)
    accepted = (v > 0) & (np.log(u[:, 2 * n : 3 * n]) < 0.5 * x * x + d * (1.0 - positive + np.log(positive)))
    first = accepted.argmax(axis=1)
    rows = np.arange(len(u))
    chosen = np.where(accepted[rows, first], positive[rows, first], 1.0)
    return np.log(d * chosen) + np.log(u[:, 3 * n]) / alpha
