"""Damaged tars, indexes, catalogues and manifests: whoever indexes, opens, reads, checks, counts or packs them is told so in
one line. Nothing but ``UserError`` and ``BadSample`` comes out, and it comes soon."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import shutil
import sys
import tarfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from pictures import encode
from PIL import Image

from dattrain.cli import main as cli
from dattrain.data.order import Order
from dattrain.data.prepare.index_shards import index_shards
from dattrain.data.prepare.pack import PackOptions, pack
from dattrain.data.prepare.sources import open_source
from dattrain.data.prepare.stats import measure
from dattrain.data.prepare.verify import verify
from dattrain.data.source import tar
from dattrain.data.source.dataset import BadSample, Dataset, open_dataset
from dattrain.data.source.folders import FolderDataset
from dattrain.data.source.index import ShardIndex, index_path
from dattrain.data.source.shards import expand
from dattrain.errors import UserError

ODD = (
    0,
    -1,
    1,
    7,
    2**31,
    2**63 - 1,
    2**63,
    -(2**63),
    10**30,
    0.5,
    float("inf"),
    float("nan"),
    True,
    None,
    "",
    "x",
)


def member(
    name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "", **pax: str
) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(content), kind, link
    info.pax_headers = pax
    head = info.tobuf(tarfile.PAX_FORMAT if pax else tarfile.GNU_FORMAT)
    return head + content + tar.padding(len(content))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Two shards with most of what a tar can hold, packed with their records, and two class tars."""
    root = tmp_path_factory.mktemp("fuzz")
    picture = encode(Image.new("RGB", (8, 8), (9, 99, 200)))
    for number in range(2):
        parts = []
        for i in range(3):
            key = f"{number}{i}" if i else f"{'long' * 40}{number}"
            meta = json.dumps({"label": i, "label_12k": [i]}).encode()
            parts += [
                member(f"{key}.jpg", picture),
                member(f"{key}.cls", b"%d" % i),
                member(f"{key}.json", meta),
            ]
        parts += [
            member("x.jpg", kind=tarfile.LNKTYPE, link=f"{number}1.jpg"),
            member("x.cls", b"1"),
            member("y.cls", b"2", comment="pax", path="ü.cls"),
            member("y.jpg", picture, path="ü.jpg"),
            member("s.jpg", kind=tarfile.SYMTYPE, link="x.jpg"),
        ]
        (root / f"t-000{number}.tar").write_bytes(b"".join(parts) + tar.END)
        (root / f"n0000000{number}.tar").write_bytes(member(f"n0000000{number}_1.JPEG", picture) + tar.END)
    index_shards(sorted(map(str, root.glob("t-*.tar"))), checksum=True)
    info = {"filenames": ["t-0000.tar", "t-0001.tar"], "shard_lengths": [6, 6]}
    (root / "_info.json").write_text(json.dumps({"splits": {"t": info}}))
    shards = [{"name": name, "samples": 6} for name in info["filenames"]]
    (root / "_t.manifest.json").write_text(json.dumps({"shards": shards, "classes": ["a", "b", "c"]}))
    (root / "list.txt").write_bytes(b"\xef\xbb\xbft-0000.tar\r\n# t\r\nt-0001.tar\n")
    for name, head in (
        ("images-idx3", b"\0\0\x08\3" + b"\0\0\0\4" * 3),
        ("labels-idx1", b"\0\0\x08\1\0\0\0\4"),
    ):
        array = random.Random(0).randbytes(64) if "images" in name else bytes(4)
        (root / f"{name}-ubyte.gz").write_bytes(gzip.compress(head + array))
    np.savez_compressed(root / "arrays.npz", images=np.zeros((3, 4, 4), np.uint8), labels=np.arange(3))
    return root


def index(folder: Path) -> None:
    index_shards(expand(str(folder / "t-*.tar")), force=True)


def enter(folder: Path) -> None:
    index_shards(expand(str(folder / "t-*.tar")))


def read(folder: Path) -> None:
    dataset = open_dataset(str(folder / "t-*.tar"), verify=True)
    Order(dataset.counts, seed=0).locate(np.arange(3))
    every_sample(dataset)


def check(folder: Path) -> None:
    verify(open_dataset(str(folder / "t-*.tar"), problems=[]))


def count(folder: Path) -> None:
    measure(open_dataset(str(folder / "t-*.tar")), limit=9).lines()


def repack(folder: Path) -> None:
    pack(open_source(str(folder / "t-*.tar")), folder / "out", PackOptions(skip_bad=True))


def classes(folder: Path) -> None:
    every_sample(open_source(str(folder / "n*.tar")))


def listed(folder: Path) -> None:
    every_sample(open_dataset(str(folder / "list.txt")))


def idx(folder: Path) -> None:
    every_sample(open_source(str(folder / "images-idx3-ubyte.gz")))


def npz(folder: Path) -> None:
    every_sample(open_source(str(folder / "arrays.npz")))


def every_sample(dataset: Dataset) -> None:
    for shard, samples in enumerate(dataset.counts.tolist()):
        for sample in range(min(samples, 20)):
            dataset.key(shard, sample), dataset.label(shard, sample)
            with suppress(BadSample):
                dataset.read(shard, sample)


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Flip, cut, double or take out bytes and blocks."""
    found = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at, kind = rng.randrange(max(1, len(found))), rng.randrange(5)
        block = at - at % tar.BLOCK
        if kind == 0 and found:
            found[at] = rng.randrange(256)
        elif kind == 1:
            del found[at:]
        elif kind == 2:
            found[block:block] = found[block : block + tar.BLOCK]
        elif kind == 3:
            del found[block : block + tar.BLOCK]
        else:
            found[at:at] = rng.randbytes(rng.randint(1, 30))
    return bytes(found)


def mutate_header(data: bytes, rng: random.Random) -> bytes:
    """Change a field of a header, with the right checksum: name, size, type, link, magic, prefix, or a PAX record's text."""
    found = bytearray(data)
    heads = [at for at in range(0, len(found), tar.BLOCK) if found[at + 257 : at + 262] == b"ustar"]
    at = rng.choice(heads)
    start, length = rng.choice(
        ((0, 100), (124, 12), (124, 12), (156, 1), (156, 1), (157, 100), (345, 155), (512, 40))
    )
    texts = (
        b"-0000000512\0",
        b"77777777777\0",
        b"\xff" * 12,
        b"\x80" + b"\0" * 7 + b"\1\0\0\0",
        b"../up.jpg\0",
        b"1" * 12,
    )
    new = rng.choice(texts) if rng.random() < 0.6 else rng.randbytes(length)
    if length == 1:
        new = rng.choice(b"01234567xgXLKSDMVN\0Q").to_bytes(1, "big")
    found[at + start : at + start + min(length, len(new))] = new[:length]
    if start < tar.BLOCK:
        found[at + 148 : at + 156] = b" " * 8
        found[at + 148 : at + 156] = b"%06o\0 " % sum(found[at : at + tar.BLOCK])
    return bytes(found)


def mutate_json(data: bytes, rng: random.Random) -> bytes:
    """Put an odd value somewhere, or take something out."""
    content = json.loads(data)
    node, places = content, []
    while isinstance(node, (dict, list)) and node:
        key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
        places.append((node, key))
        node = node[key]
    node, key = rng.choice(places)
    if rng.random() < 0.3:
        del node[key]
    else:
        node[key] = rng.choice((*ODD, [], {}, [[]] * 3))
    return json.dumps(content).encode()


def mutate_index(data: bytes, rng: random.Random) -> bytes:
    """An archive that is whole, of arrays that are not."""
    with np.load(io.BytesIO(data)) as file:
        arrays = {name: file[name] for name in file.files}
    name = rng.choice(sorted(arrays))
    array, kind = arrays[name], rng.randrange(5)
    if kind == 0:
        del arrays[name]
    elif kind == 1:
        arrays[name] = array.astype(rng.choice((np.float32, np.int32, np.uint8)))
    elif kind == 2:
        arrays[name] = array[:-1] if array.ndim else np.zeros(3)
    elif kind == 3:
        arrays[name] = array[None]
    elif array.size:
        array = array.copy().reshape(-1)
        limits = (
            (np.iinfo(np.int64) if array.dtype == np.int64 else np.iinfo(np.uint8))
            if array.dtype != bool
            else None
        )
        array[rng.randrange(array.size)] = rng.choice((limits.min, limits.max, 1)) if limits else True
        arrays[name] = array.reshape(arrays[name].shape)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


Act = Callable[[Path], None]
RECORD: list[Act] = [read, enter, check]
CASES: dict[str, tuple[str, Callable[[bytes, random.Random], bytes], list[Act]]] = {
    "tar": ("t-0000.tar", mutate_bytes, [index, read, check]),
    "tar header": ("t-0000.tar", mutate_header, [index, read, repack]),
    "tar under its index": ("t-0001.tar", mutate_bytes, [read, check, count, repack]),
    "class tar": ("n00000000.tar", mutate_bytes, [classes]),
    "class tar header": ("n00000000.tar", mutate_header, [classes]),
    "index": ("t-0000.index.npz", mutate_bytes, [read, check]),
    "index array": ("t-0000.index.npz", mutate_index, [read, check, count]),
    "catalogue": ("_catalogue.json", mutate_json, RECORD),
    "catalogue bytes": ("_catalogue.json", mutate_bytes, RECORD),
    "hub info": ("_info.json", mutate_json, RECORD),
    "manifest": ("_t.manifest.json", mutate_json, RECORD),
    "manifest bytes": ("_t.manifest.json", mutate_bytes, [*RECORD, repack]),
    "list": ("list.txt", mutate_bytes, [listed]),
    "idx images": ("images-idx3-ubyte.gz", mutate_bytes, [idx]),
    "idx labels": ("labels-idx1-ubyte.gz", mutate_bytes, [idx]),
    "npz": ("arrays.npz", mutate_bytes, [npz]),
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("examples", [5, pytest.param(300, marks=pytest.mark.full)])
@pytest.mark.parametrize("case", CASES)
def test_damage_is_one_line(whole, tmp_path, case, examples):
    name, mutate, acts = CASES[case]
    data = (whole / name).read_bytes()
    for seed in range(examples):
        folder = tmp_path / str(seed)
        shutil.copytree(whole, folder)
        (folder / name).write_bytes(mutate(data, random.Random(seed)))
        if case.startswith("index"):
            (folder / "_catalogue.json").unlink()
        for act in acts:
            try:
                act(folder)
            except (UserError, BadSample) as error:
                assert str(error) and "\n" not in str(error), f"{case}, seed {seed}"
            except Exception as error:
                raise AssertionError(
                    f"{case}, seed {seed}, {act.__name__}: {type(error).__name__}: {error}"
                ) from error
        shutil.rmtree(folder)


@pytest.mark.parametrize("record", ["_catalogue.json", "_info.json", "_t.manifest.json"])
def test_a_record_that_is_nested_without_end_is_one_line(whole, tmp_path, record):
    folder = tmp_path / "set"
    shutil.copytree(whole, folder)
    (folder / record).write_text("[" * 100_000 + '"shards" "splits"')
    for act in (read, repack):
        with pytest.raises(UserError, match=record):
            act(folder)
    # Without the words that make it a record, a manifest is read for class names alone.
    (folder / record).write_text("[" * 100_000)
    if "manifest" in record:
        with pytest.raises(UserError, match=record):
            read(folder)


def test_labels_beyond_the_names_of_a_manifest_are_named(whole, tmp_path):
    folder = tmp_path / "set"
    shutil.copytree(whole, folder)
    manifest = json.loads((folder / "_t.manifest.json").read_bytes())
    (folder / "_t.manifest.json").write_text(json.dumps({**manifest, "classes": ["a", "b"]}))
    for act in (read, repack):
        with pytest.raises(UserError, match=r"t-000\d\.tar.*has label 2, but its set names 2 classes"):
            act(folder)


@pytest.mark.parametrize("act", [expand, open_dataset, open_source, FolderDataset])
def test_a_folder_that_may_not_be_listed_is_one_line(tmp_path, act, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.scandir", refuse)
    monkeypatch.setattr("os.listdir", refuse)
    with pytest.raises(UserError, match=r"cannot be listed \(Permission denied\)"):
        act(str(tmp_path))


def test_a_fifo_in_a_list_or_beside_shards_does_not_wait_for_its_writer(whole, tmp_path):
    folder = tmp_path / "set"
    shutil.copytree(whole, folder)
    (folder / "_t.manifest.json").unlink()
    os.mkfifo(folder / "_t.manifest.json")
    with pytest.raises(UserError, match="FIFO"):
        read(folder)
    (tmp_path / "list.txt").write_text("set/_t.manifest.json 0")
    with pytest.raises(BadSample, match="FIFO"):
        open_source(str(tmp_path / "list.txt")).read(0, 0)


def test_names_that_are_no_utf8_go_through_packing_and_are_shown(tmp_path, monkeypatch, capsys):
    picture = encode(Image.new("RGB", (8, 8)))
    for name in (b"two", b"\xff\xe9"):
        os.makedirs(os.path.join(os.fsencode(tmp_path), b"in", name))
        for file in (b"\xfe.jpg", b"\xfe2.jpg"):
            with open(os.path.join(os.fsencode(tmp_path), b"in", name, file), "wb") as image:
                image.write(picture)
    for source, out in (("in", "out"), ("out", "again")):
        pack(open_source(str(tmp_path / source)), tmp_path / out, PackOptions(dedup=True))
        found = open_dataset(str(tmp_path / out))
        assert found.classes == ["two", "\udcff\udce9"] and found.counts.sum() == 1
        json.loads((tmp_path / out / "_duplicates.json").read_bytes())
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    for words in (["--samples"], []):
        monkeypatch.setattr(sys, "argv", ["dattrain", "data", "ls", str(tmp_path / "in"), *words])
        assert cli.main() == 0 and "\\udcf" in capsys.readouterr().out


@pytest.mark.timeout(60)
def test_headers_of_any_content_are_walked_in_a_moment(whole):
    """Members never overlap the end, and a walk always comes to one."""
    data = (whole / "t-0000.tar").read_bytes()
    for seed in range(300):
        rng = random.Random(seed)
        changed = mutate_header(data, rng) if seed % 2 else mutate_bytes(mutate_header(data, rng), rng)
        with suppress(UserError):
            for found in tar.walk("t", lambda at, n: changed[at : at + n], start=0, end=len(changed)):  # noqa: B023
                assert found.offset >= 0 and found.offset + found.size <= len(changed), seed


def test_what_is_not_damaged_passes(whole, tmp_path):
    """Else the damage would not be what is refused."""
    folder = tmp_path / "whole"
    shutil.copytree(whole, folder)
    dataset = open_dataset(str(folder / "t-*.tar"), verify=True)
    assert dataset.counts.tolist() == [6, 6]
    report = verify(dataset)
    assert len(report.bad) == 2 and not report.damaged, "the symbolic links"
    assert isinstance(
        ShardIndex.from_bytes(Path(index_path(str(folder / "t-0000.tar"))).read_bytes(), "x"), ShardIndex
    )
    (manifest,) = pack(open_source(str(folder / "t-*.tar")), folder / "out", PackOptions(skip_bad=True))
    assert manifest["samples"] == 10
    assert int(open_source(str(folder / "n*.tar")).counts.sum()) == 2
