"""The checking and describing verbs, through the command line."""

from __future__ import annotations

import os
import re

import numpy as np
import pytest

from dattrain.cli.main import main


def test_good_shards_and_folders_pass(make_shards, tmp_path, jpegs, capsys):
    folder = make_shards()
    assert main(["data", "verify", str(folder), "--jobs", "2", "--classes", "10"]) == 0
    assert "49 samples" in capsys.readouterr().out
    (tmp_path / "f" / "a").mkdir(parents=True)
    (tmp_path / "f" / "a" / "1.jpg").write_bytes(jpegs[0])
    assert main(["data", "verify", str(tmp_path / "f"), "--jobs", "1"]) == 0


def test_every_bad_sample_is_named_by_key_and_offset(make_shards, jpegs, capsys):
    folder = make_shards(bad={3: jpegs[0][:300], 15: b"", 44: b"text"})
    assert main(["data", "verify", str(folder), "--jobs", "2"]) == 1
    out = capsys.readouterr().out
    assert "3 bad samples, 0 damaged shards" in out
    for shard, key in ((0, "00003"), (1, "00015"), (3, "00044")):
        assert re.search(
            rf"bad: train-000{shard}.tar:{key}: .*train-000{shard}.tar: sample '{key}' at offset \d+", out
        )
    assert main(["data", "verify", str(make_shards(name="l")), "--classes", "9", "--jobs", "1"]) == 1
    assert "label 9 is not below 9" in capsys.readouterr().out


@pytest.mark.parametrize("where", [40, 600, 1030, -1400, -700])
def test_any_changed_byte_is_found(make_shards, capsys, where):
    """In headers, images, labels, padding: the checksum sees what decoding cannot."""
    folder = make_shards()
    main(["data", "index", str(folder), "--force", "--checksum", "--jobs", "1"])
    shard = folder / "train-0002.tar"
    data = bytearray(shard.read_bytes())
    data[where] ^= 1
    shard.write_bytes(data)
    capsys.readouterr()
    assert main(["data", "verify", str(folder), "--jobs", "1"]) == 1
    assert "train-0002.tar: its SHA-256 is not that of its index" in capsys.readouterr().out


def test_damaged_shards_do_not_hide_the_others(make_shards, jpegs, capsys):
    folder = make_shards(bad={44: b"text"})
    with open(folder / "train-0001.tar", "r+b") as file:
        file.truncate(3000)
    os.unlink(folder / "train-0002.tar")
    assert main(["data", "verify", str(folder / "train-{0000..0003}.tar"), "--jobs", "2"]) == 1
    out = capsys.readouterr().out
    assert "1 bad sample, 2 damaged shards" in out
    assert "train-0001.tar: has 3000 bytes" in out and "train-0002.tar: is missing" in out


def test_listing(make_shards, capsys):
    folder = make_shards((2, 3))
    assert main(["data", "ls", str(folder)]) == 0
    out, err = capsys.readouterr()
    assert [line.split("\t")[1] for line in out.splitlines()] == ["2", "3"] and "5 samples in 2 shards" in err
    assert main(["data", "ls", "--samples", str(folder / "train-0001.tar")]) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [(r[0], r[1]) for r in rows] == [(f"train-0001.tar:0000{i}", str(i)) for i in (2, 3, 4)]
    data = (folder / "train-0001.tar").read_bytes()
    assert all(data[int(r[2]) : int(r[2]) + 3] == b"\xff\xd8\xff" for r in rows)


def test_stats_and_their_picture(make_shards, tmp_path, capsys):
    from PIL import Image

    folder = make_shards()
    picture = tmp_path / "stats.png"
    assert main(["data", "stats", str(folder), "--out", str(picture), "--jobs", "2"]) == 0
    out = capsys.readouterr().out
    assert "49 in 4 shards" in out and "10 present, labels 0 to 9" in out and "per class    4 to 5" in out
    assert "49 headers: 49 jpeg" in out
    assert np.asarray(Image.open(picture).convert("L")).std() > 10
    assert main(["data", "stats", str(folder), "--limit", "20", "--jobs", "1"]) == 0
    assert "20 headers" in capsys.readouterr().out
    assert main(["data", "stats", str(folder), "--out", "x.doc"]) == 2


def test_shards_written_class_by_class_are_warned_of(tmp_path, jpegs, capsys):
    from pictures import write_tar

    def members(labels):
        return [
            (f"{i}.{x}", d) for i, c in enumerate(labels) for x, d in (("jpg", jpegs[0]), ("cls", b"%d" % c))
        ]

    write_tar(tmp_path / "a.tar", members(np.repeat(np.arange(20), 10)))
    write_tar(tmp_path / "b.tar", members(np.tile(np.arange(20), 10)))
    assert main(["data", "index", str(tmp_path / "a.tar"), "--jobs", "1"]) == 0
    assert "written class by class" in capsys.readouterr().err
    assert main(["data", "index", str(tmp_path / "b.tar"), "--jobs", "1"]) == 0
    assert "written class by class" not in capsys.readouterr().err


def test_measured_sizes_are_right(make_shards, jpegs):
    from dattrain.data.decode.images import size
    from dattrain.data.prepare.stats import measure
    from dattrain.data.source.dataset import open_dataset

    stats = measure(open_dataset(str(make_shards())), limit=None)
    expected = [size(jpegs[i % len(jpegs)]) for i in range(49)]
    assert stats.heights.tolist() == [h for h, _ in expected] and stats.widths.tolist() == [
        w for _, w in expected
    ]
    assert stats.histogram.tolist() == [5] * 9 + [4]
    stats = measure(open_dataset(str(make_shards(name="b", bad={3: b"text"}))), limit=None)
    assert stats.unreadable == 1 and len(stats.heights) == 48


def test_user_errors_are_one_line_and_exit_1(tmp_path, capsys):
    for verb in ("verify", "index", "ls", "stats"):
        assert main(["data", verb, str(tmp_path / "none")]) == 1
        err = capsys.readouterr().err
        assert err.startswith("dattrain data: ") and err.count("\n") == 1
