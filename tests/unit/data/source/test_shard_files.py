"""Tars, indexes and catalogues, whole and damaged."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from pictures import write_tar

from dattrain.data.prepare.index_shards import index_shards
from dattrain.data.source import tar
from dattrain.data.source.build_index import build
from dattrain.data.source.dataset import BadSample, ShardDataset, open_dataset
from dattrain.data.source.index import (
    NO_LABEL,
    CatalogueEntry,
    ShardIndex,
    index_path,
    read_catalogue,
    read_index,
    write_catalogue,
)
from dattrain.data.source.shards import expand
from dattrain.errors import UserError


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_scan_agrees_with_tarfile(tmp_path, format):
    """Long names, non-ASCII names, folders and links, in each format that Python writes."""
    names = [
        "a.jpg",
        "n01440764/n01440764_10026.JPEG",
        "x" * 90 + ".jpg",
        "d/" * 60 + "deep.png",
        "empty.cls",
    ]
    if format != tarfile.USTAR_FORMAT:
        names += ["y" * 300 + ".jpg", "Übergröße-象.jpg"]
    path = tmp_path / "t.tar"
    with tarfile.open(path, "w", format=format) as file:
        folder = tarfile.TarInfo("d")
        folder.type = tarfile.DIRTYPE
        file.addfile(folder)
        for i, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = 0 if name.startswith("empty") else 700 * i + 3
            file.addfile(info, io.BytesIO(bytes([i]) * info.size))
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "a.jpg"
        file.addfile(link)
    *members, last = tar.scan(str(path))
    with tarfile.open(path) as file:
        theirs = [(m.name, m.offset_data, m.size) for m in file if m.isreg()]
    assert [(m.name, m.offset, m.size) for m in members] == theirs
    assert [m.name for m in members] == names
    assert (last.name, last.kind, last.readable) == ("link.jpg", "symbolic link", False)


def test_tarfile_reads_what_we_write(tmp_path):
    path = write_tar(tmp_path / "t.tar", [("a/b.jpg", b"x" * 513), ("a/b.cls", b"7"), ("ü.json", b"")])
    with tarfile.open(path) as file:
        assert file.getnames() == ["a/b.jpg", "a/b.cls", "ü.json"]
        assert file.extractfile("a/b.jpg").read() == b"x" * 513
    with pytest.raises(ValueError, match="101 bytes"):
        tar.header("n" * 101, 1)


def test_a_large_member_needs_base_256(tmp_path):
    info = tarfile.TarInfo("big.jpg")
    info.size = 9 * 2**30
    assert tar.member_size(info.tobuf(tarfile.GNU_FORMAT)) == 9 * 2**30


@pytest.mark.parametrize("name", ["/etc/passwd.jpg", "../up.jpg", "a/../../up.jpg", "..\\up.jpg"])
def test_absolute_and_climbing_members_are_refused(tmp_path, name):
    path = write_tar(tmp_path / "t.tar", [("good.jpg", b"1"), (name, b"2")])
    with pytest.raises(UserError, match="absolute or climbing path") as error:
        build(str(path))
    assert (
        str(path) in str(error.value) and repr(name) in str(error.value) and "offset 1536" in str(error.value)
    )


def test_a_tar_cut_anywhere_is_refused(tmp_path):
    """At every block, and inside blocks: never are fewer samples indexed silently."""
    whole = write_tar(
        tmp_path / "t.tar", [(f"{i}.{x}", b"5" * 600) for i in range(3) for x in ("jpg", "json")]
    )
    data = whole.read_bytes()
    end = len(data) - 1024
    for at in [*range(0, end + 1, 512), 100, 700, end - 3, end + 100]:
        cut = tmp_path / "cut.tar"
        cut.write_bytes(data[:at])
        with pytest.raises(UserError, match=r"cut.tar: .*(cut short|not a tar)"):
            list(tar.scan(str(cut)))
    cut.write_bytes(data[:end])
    assert len(list(tar.scan(str(cut), unterminated=True))) == 6


@pytest.mark.parametrize(
    "junk", [b"hello" * 400, os.urandom(2048), b"\x1f\x8b\x08" + bytes(2000)], ids=["text", "random", "gzip"]
)
def test_what_is_no_tar_is_refused(tmp_path, junk):
    (tmp_path / "t.tar").write_bytes(junk)
    with pytest.raises(UserError, match=r"no tar header at offset 0"):
        build(str(tmp_path / "t.tar"))
    write_tar(tmp_path / "e.tar", [("README", b"x")])
    with pytest.raises(UserError, match=r"without samples; it holds 1 without extension \(README\)"):
        build(str(tmp_path / "e.tar"))


def test_layouts(tmp_path):
    """timm's hub sets, img2dataset, plain jpg/cls; and what is not a sample."""
    timm = write_tar(
        tmp_path / "imagenet22k-train-0000.tar",
        [
            ("n02112018_2107.jpg", b"A"),
            ("n02112018_2107.cls", b"12"),
            ("n02112018_2107.json", b'{"label": 3, "label_12k": 77}'),
            ("n02112019_1.cls", b"13\n"),
            ("n02112019_1.json", b'{"label_12k": 5}'),
            ("n02112019_1.jpg", b"BB"),
        ],
    )
    index = build(str(timm), checksum=True)
    assert [index.key(i) for i in range(2)] == ["n02112018_2107", "n02112019_1"]
    assert index.labels.tolist() == [12, 13] and index.lengths.tolist() == [1, 2] and len(index.sha256) == 64
    assert build(str(timm), label="label_12k").labels.tolist() == [77, 5]
    with pytest.raises(UserError, match="no integer field 'label'"):
        build(str(timm), label="label")
    i2d = write_tar(
        tmp_path / "00000.tar",
        [
            ("000000000.jpg", b"A"),
            ("000000000.json", b'{"caption": "a dog", "label": "4"}'),
            ("000000000.txt", b"a dog"),
            ("000000001.webp", b"B"),
            ("000000001.json", b'{"caption": "a cat"}'),
            (".hidden", b""),
            ("README", b"text"),
            ("sub/x.JPEG", b"C"),
            ("sub/x.cls", b"9"),
            ("only.cls", b"2"),
        ],
    )
    index = build(str(i2d))
    assert [index.key(i) for i in range(4)] == ["000000000", "000000001", "sub/x", "only"]
    assert index.labels.tolist() == [4, NO_LABEL, 9, 2] and index.offsets[3] == 0 and index.sha256 == ""


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.jpg", b"1"), ("a.cls", b"dog")], r"'a' at offset 1536: its .cls holds b'dog', not a number"),
        ([("a.jpg", b"1"), ("a.cls", b"-2")], "label -2 is negative"),
        ([("a.jpg", b"1"), ("b.jpg", b"1"), ("a.cls", b"2")], "sample 'a' comes twice"),
        ([("a.jpg", b"1"), ("a.png", b"1")], "has 2 images"),
        ([("a.jpg", b"1"), ("a.json", b"{")], r"its .json does not parse"),
    ],
)
def test_samples_that_cannot_be_indexed(tmp_path, members, message):
    path = write_tar(tmp_path / "t.tar", members)
    with pytest.raises(UserError, match=message):
        build(str(path))


def test_an_index_survives_its_file(tmp_path):
    index = ShardIndex.build([512, 0], [3, 0], [5, NO_LABEL], ["ä", "\udcff"], size=9999, sha256="ab")
    again = ShardIndex.from_bytes(index.to_bytes(), "x")
    assert (again.size, again.sha256, again.key(0), again.key(1)) == (9999, "ab", "ä", "\udcff")
    assert again.labels.tolist() == [5, NO_LABEL] and again.offsets.tolist() == [512, 0]


def test_a_damaged_index_is_named(make_shards):
    folder = make_shards()
    path = folder / "train-0001.index.npz"
    whole = path.read_bytes()
    for data in (b"", whole[:40], whole[: len(whole) // 2], whole[:-5], b"x" * 900):
        path.write_bytes(data)
        with pytest.raises(
            UserError, match=r"train-0001.index.npz: not a readable index.*dattrain data index"
        ):
            read_index(str(folder / "train-0001.tar"))
    good = ShardIndex.from_bytes(whole, "x")
    too_long = ShardIndex.build([512], [10**9], [1], ["a"], size=good.size, sha256="")
    path.write_bytes(too_long.to_bytes())
    with pytest.raises(UserError, match="contradicts itself"):
        read_index(str(folder / "train-0001.tar"))


def test_a_missing_index_says_how_to_build_it(make_shards):
    folder = make_shards()
    (folder / "_catalogue.json").unlink()
    (folder / "train-0002.index.npz").unlink()
    with pytest.raises(
        UserError, match=r"train-0002.tar: has no index .*`dattrain data index .*train-0002.tar`"
    ):
        open_dataset(str(folder))


def test_an_index_of_another_shard_is_noticed(make_shards):
    folder = make_shards((5, 6, 7))
    one, two = folder / "train-0000.index.npz", folder / "train-0001.index.npz"
    one.write_bytes(two.read_bytes())
    dataset = open_dataset(str(folder))
    with pytest.raises(UserError, match=r"its index has 6 samples .* the catalogue says 5"):
        dataset.read(0, 0)
    (folder / "_catalogue.json").unlink()
    with pytest.raises(UserError, match=r"train-0000.tar: has \d+ bytes, but its index was built for \d+"):
        open_dataset(str(folder), verify=True)


@pytest.mark.parametrize("rank", [0, 1])
def test_changed_sizes_are_noticed_at_the_start(make_shards, rank):
    folder = make_shards()
    for shard in folder.glob("*.tar"):
        with open(shard, "ab") as file:
            file.write(b"\0")
    with pytest.raises(UserError, match=rf"train-000{rank}.tar: has .* bytes, but its index was built for"):
        open_dataset(str(folder), verify=True, rank=rank, world=4)
    os.unlink(folder / "train-0003.tar")
    with pytest.raises(UserError, match=r"train-0003.tar: is missing"):
        open_dataset(str(folder / "train-{0000..0003}.tar"), verify=True, rank=3, world=4)


def test_samples_without_image_or_bytes_are_bad(tmp_path):
    write_tar(tmp_path / "t.tar", [("a.cls", b"1"), ("b.jpg", b""), ("b.cls", b"1"), ("c.jpg", b"1")])
    (shard,) = index_shards([str(tmp_path / "t.tar")])
    assert (shard.no_image, shard.no_label) == (["a (it has a.cls)"], ["c (it has c.jpg)"])
    dataset = open_dataset(str(tmp_path / "t.tar"))
    with pytest.raises(BadSample, match=r"t.tar: sample 'a' has no image member \(it has a.cls\)"):
        dataset.read(0, 0)
    with pytest.raises(BadSample, match=r"t.tar: sample 'b' at offset \d+: the image has zero bytes"):
        dataset.read(0, 1)
    assert dataset.read(0, 2).label == NO_LABEL


def test_indexing_in_parallel_can_be_tried_again(make_shards):
    folder = make_shards((3, 4, 5, 6))
    paths = [str(p) for p in sorted(folder.glob("*.tar"))]
    before = [Path(index_path(p)).read_bytes() for p in paths]
    for p in paths:
        os.unlink(index_path(p))
    (folder / "_catalogue.json").unlink()
    whole = Path(paths[3]).read_bytes()
    Path(paths[3]).write_bytes(whole[:2048])
    with pytest.raises(UserError, match=r"train-0003.tar"):
        index_shards(paths, jobs=2)
    assert not os.path.exists(index_path(paths[3]))
    assert "train-0003.tar" not in read_catalogue(folder)
    Path(paths[3]).write_bytes(whole)
    found = index_shards(paths, jobs=2)
    assert [shard.path for shard in found] == paths
    assert [Path(index_path(p)).read_bytes() for p in paths] == before
    stamps = [os.stat(index_path(p)).st_mtime_ns for p in paths]
    index_shards(paths, jobs=2)
    assert [os.stat(index_path(p)).st_mtime_ns for p in paths] == stamps, "what is indexed is left alone"


def test_a_damaged_catalogue_is_named_and_made_anew(make_shards):
    folder = make_shards((3, 4))
    (folder / "_catalogue.json").write_text("{")
    with pytest.raises(UserError, match=r"_catalogue.json: not a readable catalogue"):
        open_dataset(str(folder))
    index_shards(expand(str(folder / "train-{0000..0001}.tar")), force=True)
    assert open_dataset(str(folder)).counts.tolist() == [3, 4]
    write_catalogue(folder, {"x.tar": CatalogueEntry(1, 1536, "", 3)})
    assert json.loads((folder / "_catalogue.json").read_text())["shards"]["x.tar"]["max_label"] == 3


def test_patterns(make_shards, tmp_path):
    folder = make_shards((1, 1, 1, 1))
    all_four = [str(folder / f"train-000{i}.tar") for i in range(4)]
    assert expand(str(folder)) == expand(str(folder / "train-{0000..0003}.tar")) == all_four
    assert expand(str(folder / "train-*.tar")) == all_four
    assert expand(str(folder / "train-000{1,3}.tar")) == [all_four[1], all_four[3]]
    assert expand(f"{all_four[2]}::{all_four[0]}") == [all_four[2], all_four[0]]
    listing = tmp_path / "list.txt"
    listing.write_text("# some\nset/train-0003.tar\n\nset/train-0000.tar\n")
    assert expand(str(listing)) == [all_four[3], all_four[0]]
    (folder / "val-0000.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"several sets \(train-\*.tar, val-\*.tar\)"):
        expand(str(folder))
    for missing in ("nowhere", "set/{0..}", "set/none-*.tar", "set/{0001..0002"):
        with pytest.raises(UserError, match="no such shard|braces do not match"):
            expand(str(tmp_path / missing))


def test_reading_is_bounded_in_open_files(make_shards):
    from dattrain.data.source.shards import LocalSource, open_local

    folder = make_shards((2,) * 12)
    shards = open_local(expand(str(folder)))
    source = LocalSource(shards, max_open=3)
    dataset = ShardDataset("x", shards, source)

    def open_shards() -> int:
        links = (f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd"))
        return sum(os.readlink(link).startswith(str(folder)) for link in links if os.path.islink(link))

    rng = np.random.default_rng(0)
    for shard in rng.integers(0, 12, 60).tolist():
        assert dataset.read(shard, 1).key == f"train-{shard:04d}.tar:{2 * shard + 1:05d}"
    assert 0 < open_shards() <= 3
    dataset.close()
    assert open_shards() == 0


@pytest.mark.parametrize("form", ["{0}::{0}", "{0}/train-0000.tar::{0}/train-*.tar", "{0}::{1}", "list"])
def test_a_shard_that_is_named_twice_is_refused(make_shards, form):
    folder = make_shards()
    spec = form.format(folder, os.path.relpath(folder))
    if form == "list":
        spec = str(folder / "list.txt")
        (folder / "list.txt").write_text("train-0000.tar\ntrain-0000.tar\n")
    with pytest.raises(UserError, match="train-0000.tar twice"):
        open_dataset(spec)


def test_a_list_with_a_byte_order_mark_and_an_empty_part(make_shards):
    folder = make_shards()
    (folder / "list.txt").write_bytes(b"\xef\xbb\xbftrain-0000.tar\n")
    assert len(open_dataset(str(folder / "list.txt")).counts) == 1
    with pytest.raises(UserError, match="nothing stands on one side of a ::"):
        open_dataset(f"{folder}::")
