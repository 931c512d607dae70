"""``python -m benchmarks.decode``: its large images, and that what it says of pixels is so."""

from __future__ import annotations

import numpy as np
from PIL import Image

from benchmarks import decode as bench


def test_a_mosaic_is_of_pieces_as_they_are():
    rng = np.random.default_rng(0)
    photo = Image.fromarray(rng.integers(0, 255, (420, 410, 3), dtype=np.uint8))
    whole = np.asarray(bench.mosaic([photo], (900, 500), rng))
    assert whole.shape == (500, 900, 3) and (whole.reshape(-1, 3).max(1) > 0).mean() > 0.99
    pixels = np.asarray(photo)
    places = [(y, x) for y in range(21) for x in range(11)]
    assert any(np.array_equal(pixels[y : y + 400, x : x + 400], whole[:400, :400]) for y, x in places)


def test_a_whole_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "SIZES", {"700 x 600": (700, 600)})
    bench.main(["--count", "2", "--large", "2", "--size", "32", "--rounds", "1"])
    shown = capsys.readouterr().out
    for name in ("decoded in full", "dattrain", "packed, --resize 512", "packed, --resize 256"):
        assert name in shown
    full, ours, packed = (
        [line.split() for line in shown.splitlines() if name in line][-1]
        for name in ("decoded in full", " dattrain ", "packed, --resize 256 ")
    )
    largest = [float(row[-2]) for row in (full, ours, packed)]
    assert largest[0] == 0 and 0 < largest[1] <= 12 and largest[2] > 0
