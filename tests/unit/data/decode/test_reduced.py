"""JPEGs whose crop is much larger than the output are reduced while they are decoded: which, and by how much pixels change."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pictures import encode

from dattrain.config.data_sections import Augment
from dattrain.data.augment.cpu_transforms import eval_image, train_image
from dattrain.data.augment.plan import REDUCING_GAP, crop_box, draw, on_grid, reduction
from dattrain.data.decode import images
from dattrain.data.decode.cpu import EvalTransform, decode_sample

PLAIN = Augment(randaugment=None)
MAX, MEAN = 12, 1.3
"""What docs/benchmarks/decode-cpu.md states, in levels of 255: of a value, and of an image's mean."""


def trained(decoded: images.Decoded, plan, i: int) -> torch.Tensor:
    out = torch.empty(*plan.size, 3, dtype=torch.uint8)
    train_image(decoded.pixels, plan, i, out, size=decoded.size, factor=decoded.factor)
    return out


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(
    "encoding",
    [
        {"subsampling": "4:2:0", "quality": 75},
        {"subsampling": "4:2:0", "quality": 92},
        {"subsampling": "4:4:4", "quality": 95},
        {"progressive": True},
        {"gray": True},
    ],
)
def test_pixels_change_no_more_than_is_stated(photo, encoding, interpolation):
    options = {**encoding}
    data = encode(photo.convert("L") if options.pop("gray", False) else photo, **options)
    whole, seen = images.decode(data), set()
    for side in (16, 24, 40, 64):
        plan = draw(PLAIN.model_copy(update={"interpolation": interpolation}), 0, np.arange(12), (side, side))
        for i in range(12):
            region = plan.region(i, photo.height, photo.width)
            decoded = images.decode_reduced(data, lambda h, w, region=region: region.factor)
            assert decoded.factor == region.factor and decoded.size == (photo.height, photo.width)
            full = images.Decoded(whole, decoded.size, 1)
            change = (trained(decoded, plan, i).int() - trained(full, plan, i).int()).abs().float()
            assert change.max() <= MAX and change.mean() <= MEAN
            assert (change.max() > 0) == (region.factor > 1)
            seen.add(region.factor)
    assert seen == {1, 2, 4, 8}


@given(
    st.integers(1, 9000), st.integers(1, 9000), st.sampled_from([(32, 32), (224, 224), (384, 160)]), st.integers(0, 99)
)  # fmt: skip
def test_large_crops_lie_on_the_grid_of_their_reduction(height, width, size, position):
    plan = draw(PLAIN, 0, [position], size)
    top, left, rows, columns = box = crop_box(plan.crop[0], height, width, plan.crop_ratio)
    region = plan.region(0, height, width)
    room = min(rows / size[0], columns / size[1])
    assert region.factor == max([1, *(f for f in (2, 4, 8) if room >= REDUCING_GAP * f)])
    if region.factor == 1:
        assert region[:4] == box
    assert all(edge % region.factor == 0 for edge in region)
    assert 0 <= region.top <= height - region.height and 0 <= region.left <= width - region.width
    for edge, was, side in (
        (region.top, top, height),
        (region.left, left, width),
        (region.top + region.height, top + rows, height),
        (region.left + region.width, left + columns, width),
    ):
        assert abs(edge - was) <= region.factor / 2 or side - region.factor < edge <= was


def test_images_below_four_times_the_output_are_taken_as_ever():
    """ImageNet's usual sizes are far below; the limit at 224 pixels is a crop of 896 a side."""
    assert reduction((895, 4000), (224, 224)) == 1 and reduction((896, 896), (224, 224)) == 2
    assert reduction((1535, 1535), (384, 384)) == 1 and reduction((8000, 6000), (224, 224)) == 8
    assert on_grid((3, 5, 375, 500), 1, 400, 600) == (3, 5, 375, 500, 1)


def test_the_decoder_reduces_in_training_alone(photo):
    data, size = encode(photo), (32, 32)
    plan = draw(PLAIN, 1, np.arange(6), size)
    training = SimpleNamespace(data=[data] * 6, where=["here"] * 6, request=SimpleNamespace(plan=plan))
    evaluation = SimpleNamespace(data=[data], where=["here"], request=SimpleNamespace(plan=None))
    out = torch.empty(*size, 3, dtype=torch.uint8)
    factors = set()
    for i in range(6):
        factor = plan.region(i, photo.height, photo.width).factor
        assert decode_sample(training, i, None, out) is None
        assert torch.equal(out, trained(images.decode_reduced(data, lambda h, w, f=factor: f), plan, i))
        factors.add(factor)
    assert factors == {2, 4}
    expected = torch.empty_like(out)
    eval_image(images.decode(data), size, expected, policy="shorter", crop_pct=0.875, interpolation="bicubic")
    assert decode_sample(evaluation, 0, EvalTransform("shorter", 0.875, "bicubic"), out) is None
    assert torch.equal(out, expected)


def test_what_libjpeg_turbo_does_not_decode_is_not_reduced(photo, encodings):
    for name in ("cmyk", "png", "webp"):
        decoded = images.decode_reduced(encodings[name], lambda h, w: 4)
        assert decoded.factor == 1 and decoded.size == tuple(decoded.pixels.shape[1:])
    odd = encode(photo.crop((0, 0, 301, 203)))
    for factor in (1, 2, 4, 8):
        decoded = images.decode_reduced(odd, lambda h, w, factor=factor: factor)
        assert decoded.size == (203, 301) and decoded.factor == factor
        assert decoded.pixels.shape == (3, -(-203 // factor), -(-301 // factor))
        with pytest.raises(images.BadImage):
            images.decode_reduced(odd[: len(odd) // 2], lambda h, w, factor=factor: factor)
