"""What should be in a folder of shards is compared with what is there, whichever record knows it."""

from __future__ import annotations

import glob
import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from pictures import write_tar

from dattrain.cli.main import main
from dattrain.data.prepare.index_shards import index_shards, link_shards
from dattrain.data.source import inventory
from dattrain.data.source.dataset import open_dataset
from dattrain.data.source.index import read_catalogue
from dattrain.data.source.shards import expand
from dattrain.errors import UserError

LOST = "train-0002.tar"


def manifest(shards: dict[str, int]) -> str:
    return json.dumps({"shards": [{"name": n, "samples": s} for n, s in shards.items()]})


def hub_info(shards: dict[str, int]) -> str:
    split = {"filenames": list(shards), "shard_lengths": list(shards.values())}
    return json.dumps({"splits": {"train": split}})


RECORDS = {"_train.manifest.json": manifest, "_info.json": hub_info}
COUNTS = {"train-0000.tar": 3, "train-0001.tar": 4, LOST: 5, "train-0003.tar": 6}


@pytest.fixture(params=["_catalogue.json", *RECORDS])
def stopped(request, make_shards) -> tuple[Path, str]:
    """A copy of four shards that stopped after three, and the only record that knows."""
    folder = make_shards(COUNTS.values())
    os.unlink(folder / LOST)
    if request.param in RECORDS:
        (folder / "_catalogue.json").unlink()
        (folder / request.param).write_text(RECORDS[request.param](COUNTS))
    return folder, request.param


@pytest.mark.parametrize("pattern", ["", "train-*.tar", "train-000?.tar", "train-{0000..0003}.tar"])
def test_a_missing_shard_is_named_whoever_knows_of_it(stopped, pattern):
    folder, record = stopped
    with pytest.raises(UserError, match=rf"{LOST}: is missing, though {record} beside it names it; .*--drop"):
        open_dataset(str(folder / pattern))


def test_what_is_asked_for_by_name_may_be_a_part(stopped):
    folder, _ = stopped
    assert open_dataset(str(folder / "train-{0000,0001}.tar")).counts.tolist() == [3, 4]
    assert open_dataset(str(folder / "train-0003.tar")).counts.tolist() == [6]


def test_verify_checks_the_others(stopped, capsys):
    assert main(["data", "verify", str(stopped[0]), "--jobs", "1"]) == 1
    out = capsys.readouterr().out
    assert f"{LOST}: is missing" in out and "13 samples" in out and "1 damaged shard\n" in out


def test_index_forgets_only_when_told_to(stopped, capsys):
    folder, _ = stopped
    before = set(read_catalogue(folder))
    assert main(["data", "index", str(folder), "--jobs", "1"]) == 1
    assert f"{LOST}: is missing" in capsys.readouterr().err and before <= set(read_catalogue(folder))
    assert main(["data", "ls", str(folder)]) == 1
    assert main(["data", "index", str(folder), "--jobs", "1", "--drop"]) == 0
    assert f"dropped from the catalogue: {folder / LOST}" in capsys.readouterr().err
    index_shards(expand(str(folder)))
    assert open_dataset(str(folder)).counts.tolist() == [3, 4, 6], "it stays dropped"
    write_tar(folder / LOST, [("0.jpg", b"x"), ("0.cls", b"1")])
    index_shards(expand(str(folder)))
    os.unlink(folder / LOST)
    with pytest.raises(UserError, match=f"{LOST}: is missing"):
        open_dataset(str(folder))


@pytest.mark.parametrize("lost", ["train-0001.tar", "all.tar"])
def test_the_way_out_that_is_named_works_beside_other_sets(make_shards, tmp_path, lost, capsys):
    folder = make_shards((3, 4)).rename(tmp_path / "a [1] set")
    for name in ("val-0000.tar", "val-0001.tar", "all.tar"):
        write_tar(folder / name, [("0.jpg", b"x"), ("0.cls", b"1")])
    index_shards([str(path) for path in sorted(folder.glob("*.tar"))])
    os.unlink(folder / lost)
    spec = f"{glob.escape(str(folder))}/{lost[:2]}*"
    with pytest.raises(UserError, match=f"{lost}: is missing") as error:
        open_dataset(spec)
    way = shlex.split(re.search("`(.*)`", str(error.value))[1])
    assert way[0] == "dattrain" and main([*way[1:], "--jobs", "1"]) == 0, capsys.readouterr().err
    assert f"dropped from the catalogue: {folder / lost}" in capsys.readouterr().err
    assert len(read_catalogue(folder)) == 4


def test_a_lost_index_is_named_when_a_set_is_opened(make_shards, capsys):
    folder = make_shards((3, 4, 5))
    for i in (1, 2):
        (folder / f"train-000{i}.index.npz").unlink()
    message = (
        r"train-0001.tar: has no index \(train-0001.index.npz\) \(and 1 more: train-0002.tar\); .*`(.*)`"
    )
    with pytest.raises(UserError, match=message) as error:
        open_dataset(str(folder))
    assert main(["data", "verify", str(folder), "--jobs", "1"]) == 1
    assert "3 samples" in (out := capsys.readouterr().out) and "1 damaged" in out
    way = shlex.split(re.search(message, str(error.value))[1])
    assert main([*way[1:], "--jobs", "1"]) == 0
    assert open_dataset(str(folder)).counts.tolist() == [3, 4, 5]


@pytest.mark.parametrize("record", RECORDS)
def test_another_number_of_samples_than_a_record_says_is_an_error(make_shards, record):
    folder = make_shards(COUNTS.values())
    (folder / record).write_text(RECORDS[record]({**COUNTS, LOST: 6}))
    with pytest.raises(UserError, match=rf"{LOST}: its index has 5 samples, {record} beside it says 6"):
        open_dataset(str(folder))
    (folder / record).write_text(RECORDS[record](COUNTS))
    assert open_dataset(str(folder)).counts.tolist() == [3, 4, 5, 6]
    (folder / record).write_text('{"made for": "something else"}')
    assert open_dataset(str(folder)).counts.tolist() == [3, 4, 5, 6]


def test_all_shards_gone_and_links_that_lead_nowhere(make_shards, tmp_path):
    folder = make_shards((3, 4))
    mine = tmp_path / "mine"
    index_shards(link_shards(expand(str(folder)), str(mine)))
    os.unlink(folder / "train-0001.tar")
    with pytest.raises(UserError, match=r"mine/train-0001.tar: is missing"):
        open_dataset(str(mine))
    os.unlink(folder / "train-0000.tar")
    with pytest.raises(UserError, match=r"train-0000.tar: is missing \(and 1 more: train-0001.tar\)"):
        open_dataset(str(folder))


def test_another_split_may_be_elsewhere(make_shards):
    folder = make_shards((3, 4))
    (folder / "_info.json").write_text(hub_info({"val-0000.tar": 3}))
    assert open_dataset(str(folder)).counts.tolist() == [3, 4]


def test_gaps_in_the_numbers_are_told(tmp_path, capsys):
    for i in (0, 1, 3):
        write_tar(tmp_path / f"t-000{i}.tar", [("0.jpg", b"x"), ("0.cls", b"1")])
    assert main(["data", "index", str(tmp_path), "--jobs", "1"]) == 0
    assert "1 shards are missing between others" in (err := capsys.readouterr().err) and "t-0002.tar" in err
    assert inventory.gaps(["a-1.tar", "a-900.tar", "x.tar"]) == [], "no count of shards"


def test_an_empty_shard_is_skipped_with_a_word(tmp_path, capsys):
    write_tar(tmp_path / "t-0000.tar", [])
    write_tar(tmp_path / "t-0001.tar", [("0.jpg", b"x"), ("0.cls", b"1")])
    assert main(["data", "index", str(tmp_path), "--jobs", "1"]) == 0
    assert f"1 shards have no samples: {tmp_path / 't-0000.tar'}" in capsys.readouterr().err
    assert [os.path.basename(p) for p in open_dataset(str(tmp_path)).shards.paths] == ["t-0001.tar"]


def test_an_empty_folder_and_a_list_of_no_text_are_one_line(tmp_path):
    with pytest.raises(UserError, match=r"there are no shards \(\*.tar\) in it"):
        expand(str(tmp_path))
    (tmp_path / "list.txt").write_bytes("a.tar\n".encode("utf-16"))
    with pytest.raises(UserError, match=r"list.txt: cannot be read as a list in UTF-8"):
        expand(str(tmp_path / "list.txt"))


@pytest.fixture
def read_only(make_shards, monkeypatch):
    """Shards in a folder that may not be written, whoever asks (tests run as root, too)."""
    folder = make_shards((3, 4))
    for path in [*folder.glob("*.npz"), folder / "_catalogue.json"]:
        path.unlink()
    (folder / "_train.manifest.json").write_text(manifest({"train-0000.tar": 3, "train-0001.tar": 4}))
    (folder / "_info.json").write_text(hub_info({"train-0000.tar": 3, "val-0000.tar": 2}))
    real_open, access = os.open, os.access

    def refused(path, flags, *args, **kwargs):
        if flags & os.O_CREAT and Path(path).parent == folder:
            raise OSError(30, "Read-only file system")
        return real_open(path, flags, *args, **kwargs)

    def unlink(self: Path, missing_ok: bool = False) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "open", refused)
    monkeypatch.setattr(Path, "unlink", unlink)
    monkeypatch.setattr(os, "access", lambda p, m: Path(p) != folder and access(p, m))
    return folder


def test_a_place_that_may_not_be_written_is_indexed_elsewhere(read_only, tmp_path, capsys):
    for verb in (["index", "--jobs", "1"], ["ls"]):
        assert main(["data", *verb, str(read_only)]) == 1
        assert "--out DIR" in capsys.readouterr().err
    mine = str(tmp_path / "mine")
    for _ in range(2):
        assert main(["data", "index", str(read_only), "--jobs", "1", "--out", mine]) == 0
    assert open_dataset(mine, verify=True).counts.tolist() == [3, 4]
    # _info.json also names a split that is not linked; it holds for these shards all the same.
    assert sorted(os.listdir(mine)) == sorted(
        ["_catalogue.json", "_info.json", "_train.manifest.json"]
        + [f"train-000{i}.{x}" for i in range(2) for x in ("tar", "index.npz")]
    )
    assert main(["data", "verify", mine, "--jobs", "1"]) == 0
    one = [str(read_only / "train-0001.tar")]
    index_shards(link_shards(one, str(tmp_path / "one")))
    assert open_dataset(str(tmp_path / "one")).counts.tolist() == [4], "its records are of a part"


def test_a_folder_of_links_knows_what_its_source_lacks(stopped, tmp_path, capsys):
    folder, _ = stopped
    mine = tmp_path / "mine"
    index = ["data", "index", "--jobs", "1"]
    assert main([*index, str(folder / "train-*.tar"), "--out", str(mine)]) == 1
    err = capsys.readouterr().err
    assert f"{folder / LOST}: is missing" in err and "between others" not in err
    for verb in ("ls", "verify"):
        assert main(["data", verb, str(mine)]) == 1
        assert f"{mine / LOST}: is missing" in "".join(capsys.readouterr())
    with pytest.raises(UserError, match=f"mine/{LOST}: is missing"):
        open_dataset(str(mine))
    assert main([*index, str(mine), "--drop"]) == 0
    assert open_dataset(str(mine)).counts.tolist() == [3, 4, 6]
    assert main([*index, str(folder / "train-000[03].tar"), "--out", str(tmp_path / "part")]) == 0
    assert open_dataset(str(tmp_path / "part")).counts.tolist() == [3, 6], "named on purpose"


def test_links_never_replace_files(make_shards, tmp_path):
    folder, out = make_shards((3,)), tmp_path / "out"
    out.mkdir()
    (out / "train-0000.tar").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"train-0000.tar: is there already, and is no link to"):
        link_shards(expand(str(folder)), str(out))
    assert (out / "train-0000.tar").read_bytes() == b"mine"


def test_an_index_on_a_full_or_read_only_disk_is_one_message():
    """The real thing: procfs may not be written by anybody."""
    from dattrain.data.source.index import write_atomically

    with pytest.raises(UserError, match="cannot be written"):
        write_atomically(Path("/proc/_catalogue.json"), b"x")
    assert subprocess.run(["test", "-e", "/proc/_catalogue.json"]).returncode == 1
