"""Image folders as they are found: links, hidden folders, other formats, splits; and lists of files."""

import os

import numpy as np
import pytest

from dattrain.data.prepare.sources import open_source
from dattrain.data.source.dataset import BadSample, open_dataset
from dattrain.errors import UserError

IMAGE = b"\xff\xd8\xff some bytes"


@pytest.fixture
def root(tmp_path):
    for name in ("ant", "bee", "cat"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for k in range(3):
            (tmp_path / "set" / name / f"{name}{k}.jpg").write_bytes(IMAGE)
    return tmp_path / "set"


def contents(dataset):
    return sorted(
        (dataset.key(0, i).partition(":")[2], dataset.label(0, i)) for i in range(dataset.counts[0])
    )


EXPECTED = [
    (f"{name}/{name}{k}.jpg", label) for label, name in enumerate(("ant", "bee", "cat")) for k in range(3)
]


@pytest.mark.parametrize("target", [".", "..", "../..", "../cat", "/"])
def test_links_to_what_is_read_elsewhere(root, target):
    (root / "bee" / "link").symlink_to(target)
    dataset = open_dataset(str(root))
    assert contents(dataset) == EXPECTED
    assert dataset.notes == (f"{root}: 1 link to a folder that is read elsewhere left out: bee/link",)


def test_links_to_a_folder_outside(root, tmp_path):
    (tmp_path / "more" / "deep").mkdir(parents=True)
    (tmp_path / "more" / "deep" / "x.png").write_bytes(IMAGE)
    (tmp_path / "more" / "back").symlink_to(".")
    (root / "bee" / "a").symlink_to(tmp_path / "more" / "deep")
    (root / "bee" / "b").symlink_to(tmp_path / "more")
    dataset = open_dataset(str(root))
    assert len(contents(dataset)) == 10
    (root / "bee" / "a").unlink()
    assert ("bee/b/deep/x.png", 1) in contents(open_dataset(str(root)))


def test_a_class_that_is_a_link_to_nothing(root):
    (root / "bat").symlink_to("/not/mounted/bat")
    with pytest.raises(UserError, match="bat: a link to /not/mounted/bat, which is not there"):
        open_dataset(str(root))


def test_two_classes_that_are_one_folder(root):
    (root / "bat").symlink_to("bee")
    with pytest.raises(UserError, match="the class folders bat and bee are one and the same"):
        open_dataset(str(root))


def test_hidden_folders_and_other_files_are_counted(root):
    for hidden in (".git", "__MACOSX", "bee/.ipynb_checkpoints", "bee/@eaDir"):
        (root / hidden).mkdir()
        (root / hidden / "copy.jpg").write_bytes(IMAGE)
    (root / "bee" / "._bee0.jpg").write_bytes(b"\0\5\x16\7")
    for name in ("a.heic", "b.heic", "noext", "notes.txt"):
        (root / "cat" / name).write_bytes(IMAGE)
    (root / "flat.jpg").write_bytes(IMAGE)
    os.mkfifo(root / "cat" / "pipe.jpg")
    dataset = open_dataset(str(root))
    assert contents(dataset) == EXPECTED
    assert sorted(note.partition(": ")[2] for note in dataset.notes) == [
        "1 .txt file left out: cat/notes.txt",
        "1 file without extension left out: cat/noext",
        "1 image beside the class folders left out: flat.jpg",
        "1 pipe, socket or device left out: cat/pipe.jpg",
        "2 .heic files left out: cat/a.heic, ...",
        "2 hidden folders left out: bee/.ipynb_checkpoints, ...",
    ]


def test_a_class_of_other_files_alone_says_which(root):
    (root / "bat").mkdir()
    (root / "bat" / "x.heic").write_bytes(IMAGE)
    with pytest.raises(
        UserError, match=r"bat: a class folder without images; it holds bat/x.heic \(.heic file\)"
    ):
        open_dataset(str(root))


@pytest.mark.parametrize(
    "names",
    [
        ("train", "val"),
        ("Train", "test", "validation"),
        ("train",),
        ("train_set", "val_set", "masks"),
        ("imagenet21k_train", "imagenet21k_val", "imagenet21k_small_classes"),
    ],
)
def test_one_level_too_high(tmp_path, names):
    for name in names:
        (tmp_path / name / "ant").mkdir(parents=True)
        (tmp_path / name / "ant" / "0.jpg").write_bytes(IMAGE)
    with pytest.raises(
        UserError, match="which are splits and not classes; name one of them, as in data.train="
    ):
        open_dataset(str(tmp_path))


def test_classes_that_are_called_like_splits(root):
    for name, new in (("ant", "bullet train"), ("bee", "test tube"), ("cat", "electric train")):
        (root / name).rename(root / new)
    assert open_dataset(str(root)).classes == ["bullet train", "electric train", "test tube"]


def test_numbers_count_by_value(root):
    for name, number in (("ant", "2"), ("bee", "10"), ("cat", "1")):
        (root / name).rename(root / number)
    assert open_dataset(str(root)).classes == ["1", "2", "10"]


def test_a_link_to_no_file_is_a_bad_sample(root):
    (root / "bee" / "x.jpg").symlink_to("/not/there.jpg")
    dataset = open_dataset(str(root))
    at = next(i for i in range(10) if dataset.key(0, i).endswith("x.jpg"))
    with pytest.raises(BadSample, match="bee/x.jpg: a link to /not/there.jpg, which is not there"):
        dataset.read(0, at)


def test_the_order_of_files_does_not_depend_on_the_walk(root):
    keys = [open_dataset(str(root)).key(0, i) for i in range(9)]
    for name in ("ant", "bee", "cat"):
        for k in (0, 2, 1):
            file = root / name / f"{name}{k}.jpg"
            file.unlink()
            file.write_bytes(IMAGE)
    assert [open_dataset(str(root)).key(0, i) for i in range(9)] == keys
    assert [key.partition("/")[0] for key in keys] != sorted(key.partition("/")[0] for key in keys)


def made(tmp_path, text):
    for k in range(13):
        (tmp_path / f"{k}.jpg").write_bytes(IMAGE)
    (tmp_path / "list.csv").write_bytes(text)
    return str(tmp_path / "list.csv")


def lines(labels):
    return "".join(f"{k}.jpg,{label}\n" for k, label in enumerate(labels)).encode()


@pytest.mark.parametrize("form", ["{}", "{}.0", "+{}", "{}.", "{}e0", "{}.000e+00"])
@pytest.mark.parametrize(
    "header", [b"", b"filename,label\n", b"\xef\xbb\xbfpath,Class\n", b'"path","target"\n']
)
def test_integer_labels_stay_integers(tmp_path, form, header):
    dataset = open_source(made(tmp_path, header + lines([form.format(k) for k in range(12)])))
    assert [dataset.label(0, i) for i in range(dataset.counts[0])] == list(range(12))
    assert dataset.classes is None and len(dataset.notes) == bool(header)


def test_a_byte_order_mark_is_no_part_of_the_first_name(tmp_path):
    dataset = open_source(made(tmp_path, b"\xef\xbb\xbf" + lines(["cat", "ant"])))
    assert [dataset.read(0, i).label for i in range(2)] == [1, 0] and dataset.classes == ["ant", "cat"]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([1, 2, -1, 3], "line 3: label -1 is negative"),
        ([1, 2, "cat", 3], "line 3: label 'cat' is no integer, unlike those of most other lines"),
        ([1, "2.5", 3], "line 2: label 2.5 is no whole number"),
        ([0.5, 1.5], "line 1: label 0.5 is no whole number"),
        ([1, 99999999999], "line 2: label 99999999999 is above"),
        (["nan", 2, 3], "line 1: label 'nan' is no integer"),
        (["ant", "bee", 7], "line 3: label '7' is an integer, unlike"),
    ],
)
def test_labels_of_two_kinds_are_refused_by_line(tmp_path, labels, message):
    with pytest.raises(UserError, match=message):
        open_source(made(tmp_path, lines(labels)))


@pytest.mark.parametrize("text", [b"image,Animal\n0.jpg,ant\n", b"0.jpg ant\n1.jpg great dane\n"])
def test_a_class_none_of_whose_files_is_there_is_no_class(tmp_path, text):
    with pytest.raises(UserError, match="line [12]: class '(Animal|dane)' has no file that is there"):
        open_source(made(tmp_path, text))


def test_a_file_with_two_labels_is_named_by_line(tmp_path):
    assert open_source(made(tmp_path, b"0.jpg,ant\n0.jpg,ant\n")).counts == [2], "seen twice on purpose"
    with pytest.raises(UserError, match=r"line 3: 0.jpg has label 'bee', and 'ant' in line 1"):
        open_source(made(tmp_path, b"0.jpg,ant\n1.jpg,bee\n0.jpg,bee\n"))


@pytest.mark.parametrize("name", ["list.csv", "list.tsv", "list.txt", "a.npz", "train-images-idx3-ubyte.gz"])
def test_a_list_or_array_in_place_of_shards_says_what_to_do(tmp_path, name):
    (tmp_path / name).write_bytes(b"# all\nbee/0.jpg\t1\nbee/1.jpg\t1\n")
    with pytest.raises(UserError, match=f"`dattrain data pack {tmp_path / name} OUT`"):
        open_dataset(str(tmp_path / name))


@pytest.mark.parametrize("header", [b"", b"id,path,label\n"])
def test_a_table_of_more_columns_is_no_list(tmp_path, header):
    with pytest.raises(UserError, match=r"line [12]: 3 columns, the last of them '3'; a list has a path and"):
        open_source(made(tmp_path, header + b"0,0.jpg,3\n1,1.jpg,3\n"))


def test_what_a_source_passes_over_is_told(tmp_path):
    assert open_source(made(tmp_path, b"#0.jpg,3\n1.jpg,3\n")).notes == (
        f"{tmp_path / 'list.csv'}: 1 lines that begin with # skipped",
    )
    images, numbers = np.zeros((2, 8, 8), np.uint8), np.arange(2)
    np.savez(tmp_path / "m.npz", x_train=images, y_train=numbers, x_test=images, y_test=numbers)
    assert open_source(str(tmp_path / "m.npz")).notes[0].endswith("left out: x_test, y_test")
