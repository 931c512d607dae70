"""What a training set is: the same wherever it lies, another one after anything that changes which sample comes when."""

import pytest

from dattrain.data import identity
from dattrain.data.source.folders import FolderDataset
from dattrain.data.source.index import CatalogueEntry
from dattrain.data.source.shards import Shards

NAMES = [f"train-{n:04d}.tar" for n in range(6)]


def shards(names=NAMES, folder="/data/", counts=None, sizes=None, contents=None):
    counts = counts or [64] * len(names)
    sizes = sizes or [1024 + n for n in range(len(names))]
    contents = contents or [f"{n:x}" for n in range(len(names))]
    return Shards.build([folder + name for name in names], list(map(CatalogueEntry, counts, sizes, contents)))


def of(**changes):
    return identity.of_shards(shards(**changes))


def test_a_set_that_moved_is_the_same():
    there = of(folder="https://user:secret@host/bucket/")
    assert identity.difference(of(), there) is None and "secret" not in str(there)
    assert identity.difference(of(), of(contents=[""] * 6)) is None, "what is unknown is not compared"


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"names": NAMES[:4], "counts": [96] * 4}, "train-*.tar: 6 shards of 384 samples, now 4 of 384"),
        ({"names": NAMES[::-1]}, "now as many with other names or another order"),
        ({"names": [*NAMES[:5], "train-0009.tar"]}, "now as many with other names or another order"),
        ({"counts": [63, 65, *[64] * 4]}, "now as many with other numbers of samples in them"),
        ({"sizes": [7 * 1024, *range(1025, 1030)]}, "now as many with other sizes"),
        ({"contents": ["f", *"12345"]}, "now as many with other contents"),
        ({"names": [n.replace("train", "val") for n in NAMES]}, "now val-*.tar: 6 shards of 384 samples"),
        ({"names": [*NAMES, "more-0.tar"]}, "now train-*.tar: 6 shards of 384 samples; more-*.tar: 1 shards"),
    ],
)
def test_another_set_is_told_from_it_by_what_differs(changes, told):
    assert told in identity.difference(of(), of(**changes))


def test_a_set_without_a_pattern_in_its_names_stays_small():
    names = [f"{chr(97 + n)}.tar" for n in range(20)]
    assert len(of(names=names)) == 1
    assert "other names" in identity.difference(of(names=names), of(names=names[::-1]))


def test_a_stream_of_commands_is_counted_alone():
    one, other = (identity.of_stream([f"pipe:curl https://host/a.tar?key={k}"], 100) for k in (1, 2))
    assert identity.difference(one, other) is None
    assert identity.difference(one, identity.of_stream(["pipe:x"] * 2, 100)) is not None
    assert identity.difference(identity.of_stream(["a.tar"], 9), identity.of_stream(["b.tar"], 9)) is not None


def test_a_folder_of_images_is_its_names(tmp_path):
    for root in ("a", "b"):
        for name in ("cat/1.png", "cat/2.png", "dog/1.png"):
            (tmp_path / root / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / root / name).write_bytes(b"x")

    def of_folder(root):
        return identity.of_dataset(FolderDataset(str(tmp_path / root)))

    before = of_folder("a")
    assert identity.difference(before, of_folder("b")) is None
    (tmp_path / "b/dog/1.png").rename(tmp_path / "b/dog/3.png")
    assert "3 files, now as many with other names" in identity.difference(before, of_folder("b"))
    (tmp_path / "b/dog/4.png").write_bytes(b"x")
    assert identity.difference(before, of_folder("b")) == "3 files, now 4"
