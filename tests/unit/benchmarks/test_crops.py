from __future__ import annotations

from benchmarks import crops


def test_every_contender_makes_its_crops(tmp_path):
    folder = crops.write_set(tmp_path, 3, size=(60, 80))
    for function in crops.contenders(folder, 3, crop=32).values():
        function()
