from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from timm.data import auto_augment as timm_aa

from dattrain.data.augment.randaugment import OPERATIONS, Op, Policy, apply, arguments, draw, parse
from dattrain.errors import ConfigError

TIMM = {
    Op.AUTO_CONTRAST: ("AutoContrast", "AutoContrast"),
    Op.EQUALIZE: ("Equalize", "Equalize"),
    Op.INVERT: ("Invert", "Invert"),
    Op.ROTATE: ("Rotate", "Rotate"),
    Op.POSTERIZE: ("Posterize", "PosterizeIncreasing"),
    Op.SOLARIZE: ("Solarize", "SolarizeIncreasing"),
    Op.SOLARIZE_ADD: ("SolarizeAdd", "SolarizeAdd"),
    Op.COLOR: ("Color", "ColorIncreasing"),
    Op.CONTRAST: ("Contrast", "ContrastIncreasing"),
    Op.BRIGHTNESS: ("Brightness", "BrightnessIncreasing"),
    Op.SHARPNESS: ("Sharpness", "SharpnessIncreasing"),
    Op.SHEAR_X: ("ShearX", "ShearX"),
    Op.SHEAR_Y: ("ShearY", "ShearY"),
    Op.TRANSLATE_X: ("TranslateXRel", "TranslateXRel"),
    Op.TRANSLATE_Y: ("TranslateYRel", "TranslateYRel"),
}
FILL = (124, 116, 104)


@pytest.mark.parametrize("increasing", [False, True])
@pytest.mark.parametrize("op", OPERATIONS, ids=lambda op: op.name)
def test_operations_are_timms(op, increasing, photo, monkeypatch):
    """The same level and sign through timm's operation and through ours: the same pixels."""
    image = photo.crop((100, 100, 187, 164))
    name = TIMM[op][increasing]
    for level in (0.0, 3.3, 9.0, 10.0):
        for negative in (False, True):
            monkeypatch.setattr(timm_aa.random, "random", lambda: float(negative))  # noqa: B023
            hparams = {"img_mean": FILL, "interpolation": Image.Resampling.BICUBIC}
            if op is Op.POSTERIZE and timm_aa.LEVEL_TO_ARG[name](level, hparams) == (0,):
                continue
            theirs = timm_aa.AugmentOp(name, prob=1.0, magnitude=level, hparams=hparams)(image)
            argument = arguments(
                np.array([op]), np.array([level]), np.array([negative]), increasing=increasing
            )
            ours = apply(image, op, float(argument[0]), fill=FILL, resample=Image.Resampling.BICUBIC)
            np.testing.assert_array_equal(np.asarray(theirs), np.asarray(ours), err_msg=f"{level} {negative}")


def test_posterize_to_no_bits_is_black(photo):
    """Level 10 of timm's increasing set, where Pillow 13 raises: it must not end a run."""
    image = photo.crop((0, 0, 40, 30))
    assert not np.asarray(apply(image, Op.POSTERIZE, 0.0, fill=FILL, resample=Image.Resampling.BICUBIC)).any()


def test_the_recipes_notation_is_read_as_timm_reads_it():
    theirs = timm_aa.rand_augment_transform("rand-m9-mstd0.5-inc1", {"img_mean": FILL})
    ours = parse("rand-m9-mstd0.5-inc1")
    op = theirs.ops[0]
    assert (ours.magnitude, ours.std, ours.layers, ours.probability, ours.limit) == (
        op.magnitude,
        op.magnitude_std,
        theirs.num_layers,
        op.prob,
        timm_aa._LEVEL_DENOM,
    )
    assert [o.name for o in theirs.ops] == [TIMM[o][True] for o in OPERATIONS]
    assert parse("rand-n3-p0.7-mmax20-mstd101-tweights") == Policy(
        std=float("inf"), limit=20, layers=3, probability=0.7, weighted=True
    )


@pytest.mark.parametrize(
    "text", ["m9", "rand-m9-x3", "rand-m", "rand-n0", "rand-p2", "rand-n99", "augmix-m3", "rand-m9_inc1"]
)
def test_a_notation_that_means_nothing_is_refused(text):
    with pytest.raises(ConfigError, match="augment.randaugment="):
        parse(text)


def test_draws_have_timms_frequencies():
    ops, args = draw(parse("rand-m9-mstd0.5-inc1"), 0, np.arange(30_000))
    assert abs((ops == Op.NONE).mean() - 0.5) < 0.01
    share = np.bincount(ops[ops >= 0].ravel(), minlength=15) / (ops >= 0).sum()
    np.testing.assert_allclose(share, 1 / 15, atol=0.006)
    rotate = args[ops == Op.ROTATE]
    assert abs((rotate > 0).mean() - 0.5) < 0.03
    level = np.abs(rotate) / 3
    assert 8.9 < np.median(level) < 9.1 and 0.4 < level[level < 10].std() < 0.55 and level.max() <= 10
    # 2.3% of a normal lies above two deviations, where timm clips it.
    assert abs((level >= 9.9999).mean() - 0.0228) < 0.015


def test_weighted_draws_are_without_replacement_and_follow_the_weights():
    ops, _ = draw(parse("rand-m9-p1-tweights"), 0, np.arange(20_000))
    assert (ops[:, 0] != ops[:, 1]).all()
    theirs, weights = timm_aa._get_weighted_transforms(timm_aa._RAND_WEIGHTED_0)
    first = np.bincount(ops[:, 0], minlength=15) / len(ops)
    for name, weight in zip(theirs, weights):
        op = next(o for o, names in TIMM.items() if names[1] == name)
        assert abs(first[op] - weight) < 0.012, name
