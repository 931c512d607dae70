"""Objects over an image."""

from __future__ import annotations

import numpy as np

from dattrain.drawing import Shape, colour, draw


def test_masks_boxes_and_words_are_where_they_belong():
    pixels = np.full((120, 200, 3), 60, np.uint8)
    mask = np.zeros((20, 30), bool)
    mask[5:10] = True
    drawn = draw(pixels, [Shape((50.4, 40, 80, 60), 4, "", mask, (40, 50))])
    assert (pixels == 60).all()
    own = np.array(colour(4))
    assert (drawn[47, 55] == (128 * own + 128 * 60 + 128) // 256).all() and (drawn[55, 55] == 60).all()
    for y, x in ((40, 50), (40, 79), (59, 50), (59, 79)):
        assert (drawn[y, x] == own).all()
    assert (drawn[60:] == 60).all() and (drawn[:40] == 60).all() and (drawn[:, 80:] == 60).all()
    words = draw(pixels, [Shape((50, 40, 80, 60), 4, "box 90%")])
    assert (words[28:40, 50:80] != 60).any()
    assert (draw(pixels, [Shape((50, 40, 80, 60), 4, "box 90%")], text=False)[:40] == 60).all()


def test_the_first_is_on_top_and_edges_beyond_the_image_are_cut():
    pixels = np.zeros((60, 60, 3), np.uint8)
    whole = np.ones((60, 60), bool)
    one, two = (Shape((-20, -5, 90, 70), number, "a word", whole) for number in (1, 2))
    drawn = draw(pixels, [one, two], opacity=1)
    assert (drawn[30, 30] == colour(1)).all() and (drawn[59, 59] == colour(1)).all()
    assert (draw(pixels, [two, one], opacity=1)[30, 30] == colour(2)).all()
    outside = draw(pixels, [Shape((70, 70, 80, 80), 1, "far away")])
    assert outside.shape == pixels.shape


def test_there_are_as_many_colours_as_classes_need():
    assert len({colour(number) for number in range(200)}) == 200 and colour(1202) == colour(1202 % 255)
