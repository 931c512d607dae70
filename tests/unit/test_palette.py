"""Colours that tell classes apart, and maps over images."""

from __future__ import annotations

import numpy as np

from dattrain import palette


def test_colours_differ_and_stay_with_their_class():
    many = palette.palette(255)
    assert len(np.unique(many, axis=0)) == 255
    assert (palette.palette(19) == many[:19]).all()
    lab = palette._lab(many[:20])
    apart = np.linalg.norm(lab[:, None] - lab, axis=2) + 1000 * np.eye(20)
    assert apart.min() > 30  # a difference of 2 can just be seen
    # CIE's own values of sRGB's primaries under D65.
    primaries = palette._lab(np.array([[255, 0, 0], [0, 255, 0], [255, 255, 255]], np.uint8))
    np.testing.assert_allclose(primaries, [[53.2, 80.1, 67.2], [87.7, -86.2, 83.2], [100, 0, 0]], atol=0.1)


def test_void_and_background_show_the_image():
    pixels = np.full((1, 4, 3), 100, np.uint8)
    numbers = np.array([[1, 4, 255, 2]], np.uint8)
    names = ["wall", "sky", "Background", "background noise", "_background_ of a scene"]
    drawn = palette.overlay(pixels, numbers, names)
    expected = (100 + palette.palette(5)[[1, 4]].astype(int) + 1) // 2
    assert (drawn[0, :2] == expected).all() and (drawn[0, 2:] == 100).all()
    image = palette.map_image(numbers, names)
    assert (np.asarray(image) == numbers).all()
    colours = np.asarray(image.convert("RGBA"))[0]
    assert (colours[:2, :3] == palette.palette(5)[[1, 4]]).all() and colours[:, 3].tolist() == [
        255,
        255,
        255,
        0,
    ]
