"""RandAugment as timm defines it: drawn for a batch as arrays of operations and arguments, carried out on one image.

Cubuk et al., "RandAugment" (2020), with timm's operations, ranges and ``rand-m9-mstd0.5-inc1`` notation. What timm
draws from global generators is drawn here from counters, so a sample's operations depend on its position alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps

from dattrain.data.philox import Stream, normal, uniform
from dattrain.errors import ConfigError

_DENOMINATOR = 10.0
_TRANSLATE = 0.45


class Op(IntEnum):
    """An operation of a plan. Its argument is in the unit given here; operations without one ignore it."""

    NONE = -1
    AUTO_CONTRAST = 0
    EQUALIZE = 1
    INVERT = 2
    ROTATE = 3
    """Degrees, counter-clockwise."""
    POSTERIZE = 4
    """Bits to keep, 0 to 8; none leaves black, as Pillow before 13 had it (13 raises, and timm's recipe with it)."""
    SOLARIZE = 5
    """Threshold: values from it on are inverted."""
    SOLARIZE_ADD = 6
    """Added to values below 128."""
    COLOR = 7
    """Blend factor from gray (0) to the image (1) and beyond."""
    CONTRAST = 8
    """Blend factor from the mean gray."""
    BRIGHTNESS = 9
    """Blend factor from black."""
    SHARPNESS = 10
    """Blend factor from a smoothed image."""
    SHEAR_X = 11
    """Output (x, y) samples input (x + argument * y, y)."""
    SHEAR_Y = 12
    """Output (x, y) samples input (x, y + argument * x)."""
    TRANSLATE_X = 13
    """Fraction of the width: output (x, y) samples input (x + argument * width, y)."""
    TRANSLATE_Y = 14
    """Fraction of the height."""


OPERATIONS = tuple(op for op in Op if op is not Op.NONE)
GEOMETRIC = frozenset({Op.ROTATE, Op.SHEAR_X, Op.SHEAR_Y, Op.TRANSLATE_X, Op.TRANSLATE_Y})

_WEIGHTS = {
    Op.ROTATE: 3.0,
    Op.SHEAR_X: 2.0,
    Op.SHEAR_Y: 2.0,
    Op.TRANSLATE_X: 1.0,
    Op.TRANSLATE_Y: 1.0,
    Op.COLOR: 0.25,
    Op.SHARPNESS: 0.25,
    Op.AUTO_CONTRAST: 0.25,
    Op.SOLARIZE: 0.05,
    Op.SOLARIZE_ADD: 0.05,
    Op.CONTRAST: 0.05,
    Op.BRIGHTNESS: 0.05,
    Op.EQUALIZE: 0.05,
    Op.POSTERIZE: 0.05,
    Op.INVERT: 0.05,
}


@dataclass(frozen=True)
class Policy:
    """A parsed notation.

    Attributes:
        magnitude: mean of the level, on the scale of 0 to 10.
        std: standard deviation of the level; infinity draws it uniformly from [0, magnitude].
        limit: upper bound of the level.
        layers: operations per image.
        probability: of carrying out each.
        increasing: whether every operation grows stronger with the level.
        weighted: timm's ``tweights``: unequal chances, without replacement.
    """

    magnitude: float = 10.0
    std: float = 0.0
    limit: float = _DENOMINATOR
    layers: int = 2
    probability: float = 0.5
    increasing: bool = False
    weighted: bool = False


def parse(text: str) -> Policy:
    """Read timm's notation, e.g. ``rand-m9-mstd0.5-inc1``.

    Raises:
        ConfigError: an unknown section, or a value out of range.
    """
    kind, *sections = text.split("-")
    values: dict[str, float] = {}
    weighted = False
    for section in sections:
        match = re.fullmatch(r"(mstd|mmax|inc|m|n|p)(\d+\.?\d*|inf)", section)
        if section == "tweights":
            weighted = True
        elif match:
            values[match[1]] = float(match[2])
        else:
            kind = ""
    std = values.get("mstd", 0.0)
    policy = Policy(
        magnitude=values.get("m", 10.0),
        std=std if std <= 100 else float("inf"),
        limit=values.get("mmax", 0.0) or _DENOMINATOR,
        layers=int(values.get("n", 2)),
        probability=values.get("p", 0.5),
        increasing=values.get("inc", 0) > 0,
        weighted=weighted,
    )
    if kind != "rand" or policy.probability > 1 or not 1 <= policy.layers <= len(OPERATIONS):
        raise ConfigError(
            f"augment.randaugment={text!r} is not understood; write rand with any of -mN (level), -nN (operations), "
            "-pP (probability of each), -mstdS (spread of the level), -mmaxN, -inc1, -tweights, "
            "as in rand-m9-mstd0.5-inc1, or null for none"
        )
    return policy


def draw(
    policy: Policy, seed: int, positions: NDArray[np.int64]
) -> tuple[NDArray[np.int8], NDArray[np.float64]]:
    """Operations (B x layers; ``Op.NONE`` where skipped) and their arguments (B x layers) of the positions."""
    b, n = len(positions), policy.layers
    u = uniform(seed, Stream.OPS, positions, 5 * n + (len(OPERATIONS) if policy.weighted else 0))
    pick, skip, sign, u1, u2 = (u[:, i * n : (i + 1) * n] for i in range(5))
    if policy.weighted:
        # Efraimidis and Spirakis (2006): the largest u^(1/w) are a weighted draw without replacement.
        weight = np.array([_WEIGHTS[op] for op in OPERATIONS])
        ops = np.argsort(np.log(u[:, 5 * n :]) / weight, axis=1)[:, ::-1][:, :n]
    else:
        ops = np.floor(pick * len(OPERATIONS)).astype(np.int64)
    if policy.std == float("inf"):
        level = u1 * policy.magnitude
    elif policy.std > 0:
        level = policy.magnitude + policy.std * normal(u1, u2)
    else:
        level = np.full((b, n), policy.magnitude)
    level = np.clip(level, 0.0, policy.limit)
    args = arguments(ops, level, sign > 0.5, increasing=policy.increasing)
    ops = np.where(skip > policy.probability, int(Op.NONE), ops)
    return ops.astype(np.int8), args


def arguments(
    ops: NDArray[np.integer], level: NDArray[np.floating], negative: NDArray[np.bool_], *, increasing: bool
) -> NDArray[np.float64]:
    """Arguments of operations at levels (on the scale of 0 to 10), elementwise; ``negative`` is the drawn sign."""
    x = level / _DENOMINATOR
    sign = np.where(negative, -1.0, 1.0)
    bits, threshold = np.trunc(x * 4), np.minimum(256, np.trunc(x * 256))
    if increasing:
        enhance = np.maximum(0.1, 1.0 + sign * x * 0.9)
        bits, threshold = 4 - bits, 256 - threshold
    else:
        enhance = x * 1.8 + 0.1
    by_op = {
        Op.ROTATE: sign * x * 30.0,
        Op.POSTERIZE: bits,
        Op.SOLARIZE: threshold,
        Op.SOLARIZE_ADD: np.minimum(128, np.trunc(x * 110)),
        Op.COLOR: enhance,
        Op.CONTRAST: enhance,
        Op.BRIGHTNESS: enhance,
        Op.SHARPNESS: enhance,
        Op.SHEAR_X: sign * x * 0.3,
        Op.SHEAR_Y: sign * x * 0.3,
        Op.TRANSLATE_X: sign * x * _TRANSLATE,
        Op.TRANSLATE_Y: sign * x * _TRANSLATE,
    }
    out = np.zeros(np.shape(ops), dtype=np.float64)
    for op, value in by_op.items():
        out = np.where(ops == int(op), value, out)
    return out


def apply(
    image: Image.Image, op: int, argument: float, *, fill: tuple[int, int, int], resample: Image.Resampling
) -> Image.Image:
    """Carry out one operation on an RGB image; ``fill`` and ``resample`` serve the geometric ones."""
    matrix: tuple[float, ...]
    match op:
        case Op.NONE:
            return image
        case Op.AUTO_CONTRAST:
            return ImageOps.autocontrast(image)
        case Op.EQUALIZE:
            return ImageOps.equalize(image)
        case Op.INVERT:
            return ImageOps.invert(image)
        case Op.ROTATE:
            return image.rotate(argument, resample=resample, fillcolor=fill)
        case Op.POSTERIZE:
            return image.point([value & ~((1 << (8 - int(argument))) - 1) for value in range(256)] * 3)
        case Op.SOLARIZE:
            return ImageOps.solarize(image, int(argument))
        case Op.SOLARIZE_ADD:
            return image.point([min(255, v + int(argument)) if v < 128 else v for v in range(256)] * 3)
        case Op.COLOR:
            return ImageEnhance.Color(image).enhance(argument)
        case Op.CONTRAST:
            return ImageEnhance.Contrast(image).enhance(argument)
        case Op.BRIGHTNESS:
            return ImageEnhance.Brightness(image).enhance(argument)
        case Op.SHARPNESS:
            return ImageEnhance.Sharpness(image).enhance(argument)
        case Op.SHEAR_X:
            matrix = (1, argument, 0, 0, 1, 0)
        case Op.SHEAR_Y:
            matrix = (1, 0, 0, argument, 1, 0)
        case Op.TRANSLATE_X:
            matrix = (1, 0, argument * image.width, 0, 1, 0)
        case Op.TRANSLATE_Y:
            matrix = (1, 0, 0, 0, 1, argument * image.height)
        case _:
            raise ValueError(f"no operation {op}")
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample=resample, fillcolor=fill)
