"""ADE20K's layout as it is given out, and maps as they are found in the wild."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from given import ade, turned
from pictures import encode
from PIL import Image

from dattrain.data import identity
from dattrain.data.annotations import maps
from dattrain.data.annotations.ade20k import ADE20K
from dattrain.data.annotations.kinds import CLASSIFICATION, SEGMENTATION, check_kind
from dattrain.data.annotations.semantic import VOID, semantic_map
from dattrain.data.source.dataset import FolderDataset, open_dataset
from dattrain.data.source.index import NO_LABEL
from dattrain.data.source.sample import BadSample
from dattrain.errors import UserError


def test_ade_is_opened_as_it_is(tmp_path):
    numbers = np.array([[0, 1, 2], [3, 3, 0]], np.uint8)
    folder = ade(tmp_path / "ADE", {"a": numbers, "sub/b": numbers[:, :2]})
    dataset = open_dataset(str(folder))
    assert (dataset.annotations, dataset.classes, dataset.numbers) == (
        "maps",
        ["wall", "building", "sky"],
        None,
    )
    read = {s.key: s for s in (dataset.read(0, i) for i in range(2))}
    assert set(read) == {"training:a.jpg", "training:sub/b.jpg"}
    sample = read["training:a.jpg"]
    assert sample.label == NO_LABEL
    found = semantic_map(sample.annotation, (2, 3), None, sample.where)
    assert found.tolist() == [[VOID, 0, 1], [2, 2, VOID]]
    # The network knows sky as 7.
    dataset.renumber(np.array([4, 5, 7]))
    assert semantic_map(sample.annotation, (2, 3), dataset.numbers, "").tolist() == [
        [VOID, 4, 5],
        [7, 7, VOID],
    ]
    check_kind(dataset.annotations, SEGMENTATION, "data.train=x", "segmentation")
    with pytest.raises(
        UserError, match=r"data.train=x: .* a map .* each, and task.kind=classification needs"
    ):
        check_kind(dataset.annotations, CLASSIFICATION, "data.train=x", "classification")


def test_which_folder_is_meant(tmp_path):
    folder = ade(tmp_path / "ADE", {"a": np.zeros((2, 2), np.uint8)})
    ade(tmp_path / "ADE", {"b": np.zeros((2, 2), np.uint8)}, "validation")
    with pytest.raises(
        UserError, match=r"holds images and annotations; name .*images/training \(it has training, val"
    ):
        open_dataset(str(tmp_path / "ADE"))
    (tmp_path / "ADE" / "objectInfo150.txt").unlink()
    with pytest.raises(UserError, match=r"nothing names the classes of its maps; put .*/ADE/classes.txt"):
        open_dataset(str(folder))
    (tmp_path / "ADE" / "classes.txt").write_text("cat\ndog\n")
    dataset = open_dataset(str(folder))
    assert dataset.classes == ["cat", "dog"]
    assert semantic_map(dataset.read(0, 0).annotation, (2, 2), None, "").tolist() == [[0, 0], [0, 0]]
    release = tmp_path / "ADEChallengeData2016"
    (tmp_path / "ADE").rename(release)
    (release / "classes.txt").unlink()
    assert open_dataset(str(release / "images" / "training")).classes == list(ADE20K)
    assert len(set(ADE20K)) == 150 and (ADE20K[0], ADE20K[12], ADE20K[149]) == ("wall", "person", "flag")
    (release / "annotations").rename(release / "elsewhere")
    with pytest.raises(UserError, match=r"no maps of their classes in .*annotations/training"):
        open_dataset(str(release / "images" / "training"))


def test_names_that_are_not_clear_are_refused(tmp_path):
    folder = ade(tmp_path, {"a": np.zeros((2, 2), np.uint8)})
    own = tmp_path / "classes.txt"
    own.write_text("cat\ndog\n")
    with pytest.raises(UserError, match=r"holds objectInfo150.txt \(0 is void.* and classes.txt"):
        open_dataset(str(folder))
    (tmp_path / "objectInfo150.txt").unlink()
    own.write_text("cat\n\ndog\n")
    with pytest.raises(UserError, match=r"classes.txt: line 2 is blank"):
        open_dataset(str(folder))
    own.write_bytes("cat\nkäfer\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"classes.txt: is not UTF-8 \(byte 5 is 0xe4\)"):
        open_dataset(str(folder))
    own.write_text("cat\ndog\n\n")
    assert open_dataset(str(folder)).classes == ["cat", "dog"]


def test_an_image_and_its_map_are_one_of_each(tmp_path):
    folder = ade(tmp_path, {"a": np.ones((2, 2), np.uint8)})
    numbers = tmp_path / "annotations/training/a.png"
    upper = numbers.rename(numbers.with_suffix(".PNG"))
    dataset = open_dataset(str(folder))
    assert dataset.flaws == ()
    assert semantic_map(dataset.read(0, 0).annotation, (2, 2), None, "").tolist() == [[0, 0], [0, 0]]
    numbers.write_bytes(upper.read_bytes())
    with pytest.raises(UserError, match=r"a.PNG, a.png would be maps of one image"):
        open_dataset(str(folder))
    upper.unlink()
    numbers.write_bytes(b"")
    with pytest.raises(BadSample, match=r"a.png: the map has zero bytes"):
        open_dataset(str(folder)).read(0, 0)
    (folder / "a.jpeg").write_bytes((folder / "a.jpg").read_bytes())
    with pytest.raises(UserError, match=r"a.jpeg, a.jpg would share one map, .*annotations/training/a.png"):
        open_dataset(str(folder))


def test_several_splits_are_not_mixed(tmp_path):
    for split in ("training", "validation"):
        ade(tmp_path, {"a": np.ones((2, 2), np.uint8)}, split)
    with pytest.raises(UserError, match=r"holds training, validation, which are not to be mixed; name one"):
        open_dataset(str(tmp_path / "images"))


def test_class_folders_below_images_stay_class_folders(tmp_path, jpegs):
    for name in ("a", "b"):
        (tmp_path / "images" / "train" / name).mkdir(parents=True)
        (tmp_path / "images" / "train" / name / "x.jpg").write_bytes(jpegs[0])
    (tmp_path / "annotations" / "train").mkdir(parents=True)
    (tmp_path / "annotations" / "train" / "x.xml").write_text("boxes")
    (tmp_path / "images" / "train" / "stray.jpg").write_bytes(jpegs[0])
    dataset = open_dataset(str(tmp_path / "images" / "train"))
    assert isinstance(dataset, FolderDataset) and dataset.annotations == "none"


def test_what_has_no_partner_is_told(tmp_path):
    folder = ade(tmp_path, {"a": np.ones((2, 2), np.uint8), "b": np.ones((2, 2), np.uint8)})
    (tmp_path / "annotations/training/a.png").rename(tmp_path / "annotations/training/c.png")
    dataset = open_dataset(str(folder))
    beside = tmp_path / "annotations/training"
    assert dataset.flaws == (
        f"{folder}: 1 of 2 images have no map in {beside}: a.jpg",
        f"{beside}: 1 map without an image in {folder}: c.png",
    )
    with pytest.raises(
        BadSample, match=r"images/training/a.jpg: its map cannot be read: .*annotations/training/a.png"
    ):
        [dataset.read(0, i) for i in range(2)]


def test_another_map_is_another_set(tmp_path):
    folder = ade(tmp_path, {"a": np.ones((8, 8), np.uint8)})
    before = open_dataset(str(folder))
    (tmp_path / "annotations/training/a.png").write_bytes(
        encode(Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)), "PNG")
    )
    after = open_dataset(str(folder))
    assert before.digest == after.digest
    found = identity.difference(identity.of_dataset(before), identity.of_dataset(after))
    assert found == "1 files, now as many with other annotations"
    assert (
        identity.difference(identity.of_dataset(after), identity.of_dataset(open_dataset(str(folder))))
        is None
    )


def gray(bits: int, values: list[int]) -> bytes:
    """A PNG of one row of gray of fewer than 8 bits, which Pillow does not write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    row = 0
    for value in values:
        row = row << bits | value
    row <<= 8 - bits * len(values)
    head = struct.pack(">IIBBBBB", len(values), 1, bits, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(bytes([0, row])))
        + chunk(b"IEND", b"")
    )


def test_numbers_are_read_as_they_are_written():
    palette = Image.fromarray(np.array([[0, 5, 255]], np.uint8), "P")
    palette.putpalette([7, 9, 11] * 256)
    assert maps.read(encode(palette, "PNG"), "x").tolist() == [[0, 5, 255]]
    assert maps.read(gray(1, [0, 1, 1]), "x").tolist() == [[0, 1, 1]]
    assert maps.read(gray(2, [0, 3, 2]), "x").tolist() == [[0, 3, 2]]
    assert maps.read(gray(4, [9, 15]), "x").tolist() == [[9, 15]]
    numbers = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert (maps.read(maps.write(numbers), "x") == numbers).all()


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (
            Image.new("RGB", (2, 2), (3, 4, 5)),
            r"w: its map holds RGB colours \(\(3, 4, 5\) at x=0, y=0\); a map is a PNG",
        ),
        (Image.new("RGBA", (2, 2), (3, 4, 5, 6)), r"RGB colours with an alpha channel"),
        (Image.new("LA", (2, 2), (3, 9)), r"gray with an alpha channel \(\(3, 9\)"),
        (Image.fromarray(np.array([[0, 700]], np.uint16)), r"16 bits a pixel \(700 at x=1, y=0\)"),
    ],
    ids=["rgb", "rgba", "la", "16"],
)
def test_what_is_no_map_of_numbers_is_refused(image, message):
    data = encode(image, "PNG")
    with pytest.raises(BadSample, match=message):
        semantic_map(data, image.size[::-1], None, "w")


def test_maps_that_do_not_fit_are_refused():
    numbers = np.array([[0, 1], [2, VOID]], np.uint8)
    data = maps.write(numbers)
    with pytest.raises(BadSample, match=r"w: its annotation has 2 x 2 pixels, its image 3 x 2"):
        semantic_map(data, (2, 3), None, "w")
    with pytest.raises(
        BadSample, match=r"class 2 at x=0, y=1, but there are 2 classes .*: 0 to 1 are right, and 255"
    ):
        semantic_map(data, (2, 2), np.array([0, 1]), "w")
    with pytest.raises(BadSample, match="w: has no annotation"):
        semantic_map(b"", (2, 2), None, "w")
    noise = maps.write(np.random.default_rng(0).integers(0, 9, (64, 64), np.uint8))
    with pytest.raises(BadSample, match="w: its map does not decode"):
        semantic_map(noise[:200], (64, 64), None, "w")
    with pytest.raises(BadSample, match="w: its map is no PNG"):
        semantic_map(encode(Image.new("L", (2, 2))), (2, 2), None, "w")
    assert semantic_map(data, (2, 2), np.arange(3), "w").tolist() == numbers.tolist()


def test_zero_is_void_is_not_taken_for_granted(tmp_path):
    """A map that has 255 counts from 0: shifting it would move every class by one."""
    folder = ade(tmp_path, {"a": np.array([[0, 255]], np.uint8)})
    with pytest.raises(
        BadSample,
        match=r"a.png: has 255 at x=1, y=0; by the objectInfo150.txt of its set 0 is void, and 1 to 3 are",
    ):
        open_dataset(str(folder)).read(0, 0)


def test_exif_orientation_is_applied_by_the_size_of_the_map(tmp_path):
    folder = ade(tmp_path, {"a": np.ones((32, 16), np.uint8)})
    (folder / "a.jpg").write_bytes(turned((32, 16), 6))  # shown turned clockwise: 16 wide, 32 high
    sample = open_dataset(str(folder)).read(0, 0)
    image = Image.open(io.BytesIO(sample.data))
    assert image.size == (16, 32) and image.getexif().get(0x0112, 1) == 1
    assert np.asarray(image)[2, 13].min() > 200 and np.asarray(image)[2, 2].max() < 50
    # Drawn on the pixels as they are stored: nothing is turned.
    Image.fromarray(np.ones((16, 32), np.uint8)).save(tmp_path / "annotations/training/a.png")
    assert open_dataset(str(folder)).read(0, 0).data == turned((32, 16), 6)


@pytest.mark.parametrize(
    ("size", "orientation", "message"),
    [
        ((16, 16), 6, "its size does not tell"),
        ((16, 32), 3, "its size does not tell"),
        (
            (20, 10),
            6,
            r"annotation is for 16 x 32 pixels, and the image has 20 x 10 \(turned by its EXIF orientation 10 x 20\)",
        ),
        ((20, 10), 1, r"annotation is for 16 x 32 pixels, and the image has 20 x 10;"),
    ],
)
def test_what_the_size_does_not_settle_is_refused(tmp_path, size, orientation, message):
    shape = (16, 16) if size == (16, 16) else (32, 16)
    folder = ade(tmp_path, {"a": np.ones(shape, np.uint8)})
    (folder / "a.jpg").write_bytes(turned(size, orientation))
    with pytest.raises(BadSample, match=message):
        open_dataset(str(folder)).read(0, 0)
