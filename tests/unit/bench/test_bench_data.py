"""``dattrain bench data``: the images that it makes, and a whole run on a few of them."""

from __future__ import annotations

import argparse
import json
import statistics
from importlib.metadata import distributions

import numpy as np
import torch
from PIL import Image

from dattrain.bench import data as bench
from dattrain.bench.data_images import Images
from dattrain.bench.data_pipelines import Pipelines, wait_share
from dattrain.bench.jpegs import write_folder
from dattrain.cli import bench_data as verb
from dattrain.data.prepare.arrays import ArrayDataset
from dattrain.data.prepare.pack import PackOptions, pack


def test_images_are_like_imagenets(tmp_path):
    write_folder(tmp_path, 20)
    files = sorted(tmp_path.rglob("*.jpg"))
    assert len(files) == 20 and len({path.read_bytes() for path in files}) == 20
    assert 55_000 < statistics.mean(path.stat().st_size for path in files) < 90_000
    with Image.open(files[0]) as image:
        assert image.mode == "RGB" and image.layer[0][1:3] == (2, 2), "4:2:0"
        assert {400 < side < 530 or 345 < side < 405 for side in image.size} == {True}
        assert np.asarray(image).std() > 10


def test_a_whole_run(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    verb.add_arguments(parser)
    words = [
        "--count",
        "40",
        "--batch",
        "8",
        "--workers",
        "1",
        "--size",
        "64",
        "--rounds",
        "1",
        "--steps",
        "1",
    ]
    out = tmp_path / "report.json"
    args = parser.parse_args([*words, "--model", "dat_atto", "--device", "cpu", "--json", str(out)])
    assert verb.run(args) == 0
    report = json.loads(out.read_text())
    rows = {(m["case"].partition(",")[0], m["name"]): m for m in report["measurements"]}
    assert rows["whole pipeline", bench.BASELINE]["items"] == 40
    for name in ("timm", "webdataset, Pillow bicubic", "dattrain", "dattrain, RandAugment"):
        assert rows["whole pipeline", name]["cpu"][0] > 0
    assert ("one process", bench.LIMIT) in rows and ("one process", "dattrain") in rows
    if "nvidia-dali-cuda130" in {d.name for d in distributions()}:
        for name in ("DALI on cpu, decompression alone", "dattrain, DALI decoder on cpu"):
            assert rows["one process", name]["items"] == 40 and rows["one process", name]["cpu"][0] > 0
    shown = capsys.readouterr().out
    assert "the bar is 2.2" in shown and "the bar is 0.75" in shown and "Waiting for data" in shown


def test_the_step_has_an_output_for_every_class(tmp_path):
    """Shards with bare numbers, however large: the head, the targets and the check of labels are of one size."""
    image = np.random.default_rng(0).integers(0, 255, (4, 32, 32, 3)).astype(np.uint8)
    pack(
        ArrayDataset("arrays", image, np.array([0, 3, 1500, 2])),
        tmp_path / "shards",
        PackOptions(per_shard=4),
    )
    made = Images(tmp_path, str(tmp_path / "shards"), 4, 1.0, 32.0, 32.0, made=False)
    found = Pipelines(made, workers=1, batch=2, size=32, device=torch.device("cpu"))
    assert found.config(workers=1).model.num_classes == 1501
    assert "Waiting for data" in wait_share(found, "dat_atto", 1)


def test_it_says_whether_a_bar_is_met():
    from dattrain.bench.common import Measurement, Spread

    def row(case, name, ratio):
        one = Spread.from_values([1.0])
        return Measurement(case, name, "", one, one, one, Spread.from_values([ratio]), 1.0)

    met, missed = bench.bars(
        [row(f"{bench.PIPELINES}, 2 workers", bench.OURS, 2.3), row(bench.DECODING, bench.OURS, 0.7)]
    )
    assert met.endswith(": met.") and "NOT met" in missed
