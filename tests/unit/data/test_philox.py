from __future__ import annotations

import numpy as np
import pytest

from dattrain.data.philox import Stream, normal, philox4x32, uniform, uniform32, words


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 4, 0xFFFFFFFFFFFFFFFF, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_known_answers(counter, key, expected):
    """The vectors that Random123 publishes for philox4x32-10."""
    assert " ".join(f"{int(w):08x}" for w in philox4x32(*counter, key=key)) == expected


def test_a_draw_depends_on_its_position_alone():
    at = np.array([3, 10**12, 7])
    together = uniform(5, Stream.CROP, at, 9)
    for i, position in enumerate(at):
        np.testing.assert_array_equal(together[i], uniform(5, Stream.CROP, [position], 9)[0])
    assert len(np.unique(np.concatenate([words(5, s, at, 4).ravel() for s in Stream]))) == 4 * 3 * len(Stream)
    assert (words(5, Stream.CROP, at, 4) != words(6, Stream.CROP, at, 4)).all()
    np.testing.assert_array_equal(words(5, Stream.CROP, at, 9)[:, :4], words(5, Stream.CROP, at, 4))


def test_draws_are_uniform_and_normal():
    u = uniform(1, Stream.CROP, np.arange(20_000), 2)
    assert u.min() > 0 and u.max() < 1
    histogram = np.bincount((u.ravel() * 20).astype(int), minlength=20)
    assert ((histogram - 2000) ** 2 / 2000).sum() < 45  # chi-square, 19 degrees, p = .0007
    assert abs(np.corrcoef(u[:, 0], u[:, 1])[0, 1]) < 0.03
    assert abs(np.corrcoef(u[:-1, 0], u[1:, 0])[0, 1]) < 0.03
    z = normal(u[:, 0], u[:, 1])
    assert abs(z.mean()) < 0.03 and abs(z.std() - 1) < 0.03
    f = uniform32(1, Stream.DROP_PATH, np.arange(1000), 3)
    assert f.dtype == np.float32 and f.min() >= 0 and f.max() < 1
