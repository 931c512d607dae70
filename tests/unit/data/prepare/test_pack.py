from __future__ import annotations

import fcntl
import gzip
import io
import json
import multiprocessing
import os
import random
import struct
import tarfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from pictures import encode, write_tar
from PIL import Image

from dattrain.data.decode import images
from dattrain.data.prepare.index_shards import index_shards
from dattrain.data.prepare.pack import PackOptions, pack
from dattrain.data.prepare.sources import open_source
from dattrain.data.source.build_index import build
from dattrain.data.source.dataset import open_dataset
from dattrain.data.source.index import read_index
from dattrain.errors import UserError


@pytest.fixture
def folder(tmp_path, jpegs, encodings) -> Path:
    """Three classes of unequal size; a PNG named .JPEG, a dotted name, a nested folder, formats that must be changed."""
    root = tmp_path / "images"
    for c, n in (("n01", 9), ("n02", 5), ("n03", 7)):
        (root / c / "sub").mkdir(parents=True)
        for i in range(n):
            (root / c / ("sub" if i % 3 == 0 else ".") / f"{c}.v1_{i}.JPEG").write_bytes(jpegs[i])
    (root / "n03" / "really.JPEG").write_bytes(encodings["png"])
    (root / "n03" / "cmyk.JPEG").write_bytes(encodings["cmyk"])
    (root / "n01" / "anim.gif").write_bytes(encodings["gif"])
    (root / "n02" / "photo.webp").write_bytes(encodings["webp"])
    return root


def contents(out: Path, split: str = "train") -> dict[str, tuple[int, bytes]]:
    """Original name to label and image bytes, read by tarfile; each name once."""
    found = {}
    for path in sorted(out.glob(f"{split}-*.tar")):
        with tarfile.open(path) as file:
            members = {m.name: file.extractfile(m).read() for m in file}
        for name, data in members.items():
            stem, extension = os.path.splitext(name)
            if extension == ".json":
                info = json.loads(data)
                assert int(members[stem + ".cls"]) == info["label"]
                (image,) = [members[stem + x] for x in (".jpg", ".png", ".webp") if stem + x in members]
                assert Image.open(io.BytesIO(image)).size == (info["width"], info["height"])
                assert info["filename"] not in found, "doubled"
                found[info["filename"]] = info["label"], image
    return found


def originals(root: Path) -> dict[str, tuple[int, bytes]]:
    classes = sorted(p.name for p in root.iterdir())
    return {
        str(p.relative_to(root)): (classes.index(p.relative_to(root).parts[0]), p.read_bytes())
        for p in root.rglob("*")
        if p.is_file()
    }


def test_a_folder_is_packed_whole_and_unchanged(folder, tmp_path):
    out = tmp_path / "out"
    (manifest,) = pack(open_source(str(folder)), out, PackOptions(per_shard=7), jobs=2)
    was, found = originals(folder), contents(out)
    assert {n: (label, data) for n, (label, data) in found.items() if not n.endswith("gif")} == {
        n: v for n, v in was.items() if not n.endswith("gif")
    }
    assert found["n01/anim.gif"][1].startswith(b"\x89PNG")
    counts = Counter(label for label, _ in was.values())
    assert manifest["histogram"] == {str(label): n for label, n in sorted(counts.items())}
    assert manifest["samples"] == 25 and manifest["classes"] == ["n01", "n02", "n03"]
    assert [s["samples"] for s in manifest["shards"]] == [6, 6, 6, 7]
    for shard in manifest["shards"]:
        path = str(out / shard["name"])
        assert (os.path.getsize(path), read_index(path).sha256) == (shard["bytes"], shard["sha256"])
        # What a scan of the tar finds is what packing noted.
        assert build(path, checksum=True).to_bytes() == read_index(path).to_bytes()


def test_the_layout_is_the_hubs(folder, tmp_path):
    """timm's own reader of imagenet-22k-wds and the webdataset library read it as it is."""
    from timm.data.readers.reader_wds import ReaderWds
    from webdataset import WebDataset

    out = tmp_path / "out"
    pack(open_source(str(folder)), out, PackOptions(per_shard=7, holdout=6))
    info = json.loads((out / "_info.json").read_text())["splits"]
    assert {k: v["num_samples"] for k, v in info.items()} == {"train": 19, "val": 6}
    assert info["val"] == {
        "name": "val",
        "num_samples": 6,
        "filenames": ["val-0000.tar"],
        "shard_lengths": [6],
    }
    reader = ReaderWds(str(out), split="val", is_training=False, batch_size=2)
    assert sorted(label for _, label in reader) == sorted(label for label, _ in contents(out, "val").values())
    seen = [
        s["json"]["filename"] for s in WebDataset(str(out / "train-0000.tar"), shardshuffle=False).decode()
    ]
    assert seen and set(seen) <= set(contents(out))
    assert set(contents(out)).isdisjoint(contents(out, "val"))
    assert set(contents(out)) | set(contents(out, "val")) == set(originals(folder))


def test_equal_settings_give_equal_bytes_and_seeds_shuffle(folder, tmp_path):
    def packed(name: str, jobs: int, **options) -> list[bytes]:
        pack(open_source(str(folder)), tmp_path / name, PackOptions(per_shard=9, **options), jobs=jobs)
        return [p.read_bytes() for p in sorted((tmp_path / name).glob("*.tar"))]

    assert packed("a", 1) == packed("b", 3) != packed("c", 1, seed=1)
    packed("d", 1, seed=None)
    dataset = open_dataset(str(tmp_path / "d"))
    keys = [dataset.key(s, i) for s, n in enumerate(dataset.counts) for i in range(n)]
    assert keys == sorted(keys), "the source's order"
    dataset = open_dataset(str(tmp_path / "a"))
    keys = [dataset.key(s, i) for s, n in enumerate(dataset.counts) for i in range(n)]
    assert keys != sorted(keys)


def test_resize_and_encode_anew(folder, tmp_path):
    out = tmp_path / "out"
    pack(open_source(str(folder)), out, PackOptions(resize=64, format="webp", quality=80))
    for name, (_, data) in contents(out).items():
        image = Image.open(io.BytesIO(data))
        was = Image.open(folder / name)
        assert image.format == "WEBP" and min(image.size) == min(64, min(was.size))
        scale = min(image.size) / min(was.size)
        assert abs(max(image.size) - max(was.size) * scale) <= 0.5
    # Small images of the right format are left as they are.
    pack(open_source(str(folder)), tmp_path / "two", PackOptions(resize=100))
    two = contents(tmp_path / "two")
    for name, (_, data) in originals(folder).items():
        if min(Image.open(io.BytesIO(data)).size) <= 100:
            assert two[name][1] == data


def test_duplicates_are_left_out_on_request(folder, tmp_path):
    """The same twelve photographs are in each class, so only the first of each stays."""
    (manifest,) = pack(open_source(str(folder)), tmp_path / "out", PackOptions(dedup=True), jobs=2)
    blobs = [data for _, data in contents(tmp_path / "out").values()]
    unique = {data for _, data in originals(folder).values()}
    assert len(blobs) == len(set(blobs)) == len(unique) == manifest["samples"]
    rows = json.loads((tmp_path / "out" / "_duplicates.json").read_text())
    assert len(rows) == len(originals(folder)) - len(unique)
    where = {f"images:{n}": v for n, v in originals(folder).items()}
    for row in rows:
        (a, x), (b, y) = where[row["key"]], where[row["repeats"]]
        assert x == y and row["same_label"] == (a == b)


def test_lists_arrays_and_shards_are_sources_too(folder, tmp_path, jpegs):
    listing = tmp_path / "list.txt"
    listing.write_text("# path label\nimages/n01/n01.v1_1.JPEG 7\nimages/n02/n02.v1_1.JPEG\t3\n")
    dataset = open_source(str(listing))
    assert [dataset.label(0, i) for i in range(2)] == [7, 3] and dataset.read(0, 0).data == jpegs[1]
    words = tmp_path / "words.csv"
    words.write_text("n01/n01.v1_1.JPEG,zebra\nn01/n01.v1_2.JPEG,ape\n")
    dataset = open_source(str(words), root=str(folder))
    assert dataset.classes == ["ape", "zebra"] and [dataset.label(0, i) for i in range(2)] == [1, 0]
    images = np.random.default_rng(0).integers(0, 256, (5, 3, 8, 9), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", x_train=images, y_train=np.arange(5, dtype=np.uint8))
    dataset = open_source(str(tmp_path / "a.npz"))
    assert (np.asarray(Image.open(io.BytesIO(dataset.read(0, 3).data))) == images[3].transpose(1, 2, 0)).all()
    write_idx(tmp_path / "t-images-idx3-ubyte.gz", images[:, 0])
    write_idx(tmp_path / "t-labels-idx1-ubyte.gz", np.arange(5, dtype=np.uint8))
    out = tmp_path / "idx"
    pack(open_source(str(tmp_path / "t-images-idx3-ubyte.gz")), out, PackOptions(split="s"))
    for number, (label, data) in contents(out, "s").items():
        assert label == int(number) and (np.asarray(Image.open(io.BytesIO(data))) == images[label, 0]).all()
    pack(open_source(str(out)), tmp_path / "again", PackOptions(per_shard=2, seed=3))
    assert sorted(v for v in contents(tmp_path / "again").values()) == sorted(contents(out, "s").values())


def listed(path: Path, content: str | bytes) -> tuple[list[str], list[int]]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    for name in ("a.jpg", "b, c.jpg", 'd "e".jpg'):
        (path.parent / name).touch()
    dataset = open_source(str(path))
    return [dataset.key(0, i).partition(":")[2] for i in range(dataset.counts[0])], [
        dataset.label(0, i) for i in range(dataset.counts[0])
    ]


@pytest.mark.parametrize(
    "content, labels",
    [
        ('"path","label"\r\n"a.jpg","10"\r\n"b, c.jpg","9"\r\n"d ""e"".jpg", "2"\r\n', [10, 9, 2]),
        ('a.jpg,"10"\n"b, c.jpg",9\nd "e".jpg,2\n', [10, 9, 2]),
        ('a.jpg,"pear, red"\n"b, c.jpg",apple\n"d ""e"".jpg","6"" nail"\n', [2, 1, 0]),
        ('a.jpg\t"10"\n"b, c.jpg"\t9\n"d ""e"".jpg"\t"2"\n', [10, 9, 2]),
    ],
)
def test_tables_quote_their_fields(tmp_path, content, labels):
    assert listed(tmp_path / "l.csv", content) == (["a.jpg", "b, c.jpg", 'd "e".jpg'], labels)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("l.csv", '"a.jpg","0\n', r"l.csv, line 1: .* quotes do not match"),
        ("l.csv", '"a.jpg","cat","0"\n', "line 1: .* has 3 columns"),
        ("l.csv", "a.jpg,'10'\n", "line 1: .* has quotes"),
        ("l.txt", 'a.jpg "10"\n', "line 1: .* has quotes.*call the list .csv"),
        ("l.txt", '"a.jpg",10\n', "line 1: .* has quotes"),
        ("l.txt", 'a.jpg,"pear, red"\n', "line 1: .* has quotes"),
        ("l.csv", "a.jpg,0\n".encode("utf-16"), "line 1: is UTF-16.* must be UTF-8"),
        ("l.csv", b"\xfe\xff" + "a.jpg,0\n".encode("utf-16-be"), "line 1: is UTF-16.* must be UTF-8"),
        ("l.txt", "#\na.jpg 0\n".encode("utf-16-le"), "line 1: is UTF-16.* must be UTF-8"),
    ],
)
def test_quotes_and_encodings_that_are_none_of_a_list(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message):
        listed(tmp_path / name, content)


@pytest.mark.parametrize("other", ["./a.jpg", "x/../a.jpg", "{}/a.jpg", ".//a.jpg"])
def test_a_file_has_one_label_however_it_is_spelled(tmp_path, other):
    other = other.format(tmp_path)
    with pytest.raises(
        UserError, match=r"line 3: .*a.jpg has label '3', and '0' in line 1; an image has one class"
    ):
        listed(tmp_path / "l.csv", f"a.jpg,0\nx/a.jpg,3\n{other},3\n")


def write_idx(path: Path, array: np.ndarray) -> None:
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


def test_sources_that_cannot_be_read(tmp_path):
    def refused(name: str, message: str, data: bytes | None = None) -> None:
        if data is not None:
            (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=message):
            open_source(str(tmp_path / name))

    refused("none", "no such shard, folder or pattern")
    refused("e.txt", "names no images", b"# nothing\n")
    refused("b.txt", r"b.txt, line 2: 'alone' is not a path and a label", b"a.jpg 1\nalone\n")
    refused("a.npz", "not a readable npz", b"junk")
    refused("x-idx3-ubyte", "not an IDX file", b"junk")
    np.savez(tmp_path / "c.npz", pictures=np.zeros(3))
    refused("c.npz", "holds pictures; it needs images")
    np.savez(tmp_path / "d.npz", images=np.zeros((2, 4, 4), np.float32), labels=np.zeros(2, np.int64))
    refused("d.npz", r"images of shape \(2, 4, 4\) and type float32")
    np.savez(tmp_path / "f.npz", images=np.zeros((2, 4, 4), np.uint8), labels=np.zeros(3, np.int64))
    refused("f.npz", r"labels of shape \(3,\)")
    write_idx(tmp_path / "t-images-idx3-ubyte.gz", np.zeros((2, 4, 4), np.uint8))
    refused("t-images-idx3-ubyte.gz", "no file of labels beside it; name it with --labels")
    whole = (tmp_path / "t-images-idx3-ubyte.gz").read_bytes()
    write_idx(tmp_path / "t-labels-idx1-ubyte.gz", np.zeros(2, np.uint8))
    refused("t-images-idx3-ubyte.gz", "cannot be read|cut short", whole[:20])
    (tmp_path / "root" / "empty").mkdir(parents=True)
    refused("root", "a class folder without images")


def test_bad_images_stop_packing_or_are_left_out_by_name(folder, tmp_path, jpegs):
    (folder / "n01" / "torn.JPEG").write_bytes(jpegs[0][:200])
    (folder / "n02" / "nothing.png").write_bytes(b"")
    (folder / "n03" / "text.jpg").write_bytes(b"no image at all")
    source = open_source(str(folder))
    with pytest.raises(UserError, match=r"images/n0./(torn.JPEG|nothing.png|text.jpg).*--on-bad skip"):
        pack(source, tmp_path / "a", PackOptions(per_shard=5))
    (manifest,) = pack(source, tmp_path / "b", PackOptions(per_shard=5, skip_bad=True), jobs=2)
    assert {os.path.basename(b["key"]) for b in manifest["bad"]} == {"torn.JPEG", "nothing.png", "text.jpg"}
    assert manifest["samples"] == 25 and set(contents(tmp_path / "b")) == set(originals(folder)) - {
        "n01/torn.JPEG",
        "n02/nothing.png",
        "n03/text.jpg",
    }
    # Packing again finds everything done, and says the same.
    assert pack(source, tmp_path / "b", PackOptions(per_shard=5, skip_bad=True)) == [manifest]


def test_what_is_there_is_not_mixed_with_something_else(folder, tmp_path):
    out = tmp_path / "out"
    pack(open_source(str(folder)), out, PackOptions(per_shard=7))
    with pytest.raises(UserError, match=r"another packing of 'train': seed \(0 then, 1 now\)"):
        pack(open_source(str(folder)), out, PackOptions(per_shard=7, seed=1))
    (folder / "n01" / "new.JPEG").write_bytes((folder / "n01" / "n01.v1_1.JPEG").read_bytes())
    with pytest.raises(UserError, match="another packing .* content"):
        pack(open_source(str(folder)), out, PackOptions(per_shard=7))
    pack(open_source(str(folder)), out, PackOptions(per_shard=7, split="more"))
    assert len(json.loads((out / "_info.json").read_text())["splits"]) == 2
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "train-0003.tar").write_bytes(b"someone's")
    with pytest.raises(UserError, match=r"train-0003.tar: is there already"):
        pack(open_source(str(folder)), tmp_path / "foreign", PackOptions())
    assert (tmp_path / "foreign" / "train-0003.tar").read_bytes() == b"someone's"
    with pytest.raises(UserError, match="holdout of 99 of 26"):
        pack(open_source(str(folder)), tmp_path / "h", PackOptions(holdout=99))


def test_nothing_is_packed_over_itself(folder, tmp_path):
    source = open_source(str(folder))
    with pytest.raises(UserError, match="a holdout that is called 'train' like the rest would overwrite it"):
        pack(source, tmp_path / "out", PackOptions(holdout=3, holdout_split="train"))
    (tmp_path / "link").symlink_to(folder)
    for out in (folder, folder / "out", tmp_path / "link" / "n01"):
        with pytest.raises(UserError, match="lies among the class folders of"):
            pack(source, out, PackOptions())
    assert not (folder / "out").exists()


def test_two_packings_do_not_meet(folder, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    with open(tmp_path / "out" / ".pack.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        monkeypatch.setattr(time, "sleep", lambda _: None)
        with pytest.raises(UserError, match="another packing is at work there"):
            pack(open_source(str(folder)), tmp_path / "out", PackOptions())


@pytest.mark.parametrize("calls", [0, 1, 2, 4])
def test_a_full_disk_is_one_message(folder, tmp_path, monkeypatch, calls):
    """Full from the start, in the first shard, at its index, and later; afterwards packing goes on."""
    left = [calls]
    fsync = os.fsync

    def full(fd: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        fsync(fd)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\)"):
        pack(open_source(str(folder)), tmp_path / "out", PackOptions(per_shard=7))
    monkeypatch.undo()
    assert not list((tmp_path / "out").glob(".*.part"))
    pack(open_source(str(folder)), tmp_path / "out", PackOptions(per_shard=7))
    assert set(contents(tmp_path / "out")) == set(originals(folder))


def kill_and_resume(source: Path, out: Path, kills: int, expected: dict, *, window: float) -> int:
    """Start packing over and over, each time killing it at a random moment; then let it finish.

    Returns how often it was at work when it was killed.
    """
    rng = random.Random(str(out))
    options = PackOptions(per_shard=40, dedup=True)
    hits = 0
    for _ in range(kills):
        process = multiprocessing.get_context("fork").Process(
            target=pack, args=(open_source(str(source)), out, options), kwargs={"jobs": 2}
        )
        process.start()
        end = time.monotonic() + 60
        while process.is_alive() and not locked(out / ".pack.lock") and time.monotonic() < end:
            time.sleep(0.002)
        time.sleep(rng.random() * window)
        hits += process.is_alive()
        process.kill()
        process.join()
        for path in out.glob("train-*.tar"):  # whatever is published is whole
            with tarfile.open(path) as file:
                assert len(file.getnames()) % 3 == 0
    pack(open_source(str(source)), out, options, jobs=2)
    assert contents(out) == expected, "lost or changed"
    assert not list(out.glob(".*.part"))
    assert sum(open_dataset(str(out), verify=True).counts) == len(expected)
    return hits


def locked(path: Path) -> bool:
    if not path.exists():
        return False
    with open(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
        return False


@pytest.fixture
def many(tmp_path, photo) -> Path:
    """400 different images."""
    root = tmp_path / "many"
    for c in range(4):
        (root / f"c{c}").mkdir(parents=True)
        for i in range(100):
            crop = photo.crop((i, 3 * c * 10, i + 240, 3 * c * 10 + 200))
            (root / f"c{c}" / f"{i}.jpg").write_bytes(encode(crop))
    return root


def test_kills_lose_and_double_nothing(many, tmp_path):
    assert kill_and_resume(many, tmp_path / "out", 5, originals(many), window=0.4) >= 2


@pytest.mark.full
def test_fifty_kills_lose_and_double_nothing(many, tmp_path):
    hits = sum(
        kill_and_resume(many, tmp_path / f"o{i}", 5, originals(many), window=0.1 * (i + 1)) for i in range(10)
    )
    assert hits >= 25


def hub_shard(path: Path, jpegs: list[bytes], *, order: tuple[str, ...] = ("jpg", "cls", "json")) -> Path:
    """As timm's imagenet-22k-wds: two labels, a name, and what else there may be."""
    members = []
    for i in range(5):
        info = {
            "label": i,
            "label_12k": 100.0 + i,
            "filename": f"n1/{i}.JPEG",
            "class": "n1",
            "width": 1,
            "note": "ü",
        }
        content = {"jpg": jpegs[i], "cls": b"%d" % i, "json": json.dumps(info).encode()}
        members += [(f"k{i}.{x}", content[x]) for x in order if not (x == "json" and i == 4)]
    return write_tar(path, members)


@pytest.mark.parametrize("order", [("jpg", "cls", "json"), ("json", "cls", "jpg"), ("cls", "json", "jpg")])
def test_foreign_fields_stay(tmp_path, jpegs, order):
    """Wherever the .json stands among a sample's members; a packing's own label and size go before."""
    path = str(hub_shard(tmp_path / "h.tar", jpegs, order=order))
    index_shards([path])
    pack(open_source(path), tmp_path / "out", PackOptions())
    with tarfile.open(tmp_path / "out" / "train-0000.tar") as file:
        infos = {m.name.partition("-")[2]: json.load(file.extractfile(m)) for m in file if "json" in m.name}
    for i in range(4):
        height, width = images.size(jpegs[i])
        assert infos[f"k{i}.json"] == {
            "label": i,
            "label_12k": 100.0 + i,
            "filename": f"n1/{i}.JPEG",
            "class": "n1",
            "height": height,
            "width": width,
            "note": "ü",
        }
    assert infos["k4.json"]["filename"] == "k4"


def test_labels_of_another_field(tmp_path, jpegs):
    path = str(hub_shard(tmp_path / "h.tar", jpegs))
    index_shards([path])
    with pytest.raises(UserError, match=r"'k4' at offset \d+: its .json has no integer field 'label_12k'"):
        pack(open_source(path, label="label_12k"), tmp_path / "a", PackOptions(label="label_12k"))
    out, options = tmp_path / "out", PackOptions(label="label_12k", skip_bad=True)
    (manifest,) = pack(open_source(path, label="label_12k"), out, options)
    dataset = open_dataset(str(out))
    assert sorted(dataset.label(0, i) for i in range(4)) == [100, 101, 102, 103] and len(manifest["bad"]) == 1
    with pytest.raises(UserError, match="label"):
        pack(open_source(path), out, PackOptions())
    with pytest.raises(UserError, match="has no integer field 'note', but note 'ü'"):
        pack(open_source(path, label="note"), tmp_path / "b", PackOptions(label="note"))
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 4, 4), np.uint8), labels=np.zeros(2, np.int64))
    with pytest.raises(UserError, match="--label x: .*a.npz holds no shards"):
        open_source(str(tmp_path / "a.npz"), label="x")
