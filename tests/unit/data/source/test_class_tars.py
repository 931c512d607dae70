"""ImageNet as it is given out, a tar per synset or a tar of such tars, goes into shards as it is."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
from pictures import write_tar

from dattrain.cli.main import main
from dattrain.data.prepare.sources import open_source
from dattrain.data.source import tar
from dattrain.data.source.class_tars import ClassTars, find
from dattrain.data.source.dataset import open_dataset
from dattrain.errors import UserError

SYNSETS = ["n01440764", "n01443537", "n02084071"]


@pytest.fixture
def release(tmp_path, jpegs) -> Path:
    """Three class tars; the second is empty."""
    folder = tmp_path / "winter21"
    folder.mkdir()
    for c, synset in enumerate(SYNSETS):
        names = [] if c == 1 else [f"{synset}_{i}.JPEG" for i in range(4)]
        write_tar(folder / f"{synset}.tar", [(name, jpegs[(4 * c + i) % 12]) for i, name in enumerate(names)])
    return folder


def whole(release: Path, prefix: str) -> Path:
    """The release as one tar."""
    files = sorted(release.glob("*.tar"))
    return write_tar(release.parent / "whole.tar", [(prefix + f.name, f.read_bytes()) for f in files])


def packed(out: Path) -> dict[str, tuple[int, bytes]]:
    found = {}
    with tarfile.open(out / "train-0000.tar") as file:
        members = {m.name: file.extractfile(m).read() for m in file}
    for name, data in members.items():
        if name.endswith(".json"):
            info = json.loads(data)
            stem = name.removesuffix(".json")
            assert info["class"] == info["filename"].partition("/")[0]
            assert int(members[stem + ".cls"]) == info["label"]
            found[info["filename"]] = info["label"], members[stem + ".jpg"]
    return found


@pytest.mark.parametrize("form", ["folder", "pattern", "whole", "whole in a folder"])
def test_one_command_packs_a_release(release, tmp_path, jpegs, capsys, form):
    source = {
        "folder": release,
        "pattern": release / "n*.tar",
        "whole": whole(release, ""),
        "whole in a folder": whole(release, "winter21_whole/"),
    }[form]
    assert main(["data", "pack", str(source), str(tmp_path / "out"), "--jobs", "1"]) == 0
    assert packed(tmp_path / "out") == {
        f"{SYNSETS[c]}/{SYNSETS[c]}_{i}.JPEG": (c, jpegs[(4 * c + i) % 12]) for c in (0, 2) for i in range(4)
    }
    assert open_source(str(source)).classes == SYNSETS
    manifest = json.loads((tmp_path / "out" / "_train.manifest.json").read_text())
    assert manifest["classes"] == SYNSETS
    assert open_dataset(str(tmp_path / "out"), verify=True).counts.tolist() == [8]


def test_headers_are_read_in_parallel_and_images_where_they_lie(release, jpegs):
    path = str(whole(release, ""))
    one, two = open_source(path), open_source(path, jobs=2)
    assert isinstance(one, ClassTars) and [one.index(c).to_bytes() for c in range(3)] == [
        two.index(c).to_bytes() for c in range(3)
    ]
    sample = one.read(2, 1)
    assert (sample.key, sample.label, sample.data) == ("whole.tar:n02084071/n02084071_1.JPEG", 2, jpegs[9])
    content = Path(path).read_bytes()
    offset = int(one.index(2).offsets[1])
    assert content[offset : offset + len(jpegs[9])] == jpegs[9] and f"offset {offset}" in sample.where
    assert one.counts.tolist() == [4, 0, 4] and one.max_label == 2


@pytest.mark.parametrize("verb", ["index", "ls", "stats", "verify"])
def test_other_verbs_say_what_to_do(release, capsys, verb):
    for spec, source in ((release, release), (whole(release, ""), whole(release, ""))):
        assert main(["data", verb, str(spec), *([] if verb == "ls" else ["--jobs", "1"])]) == 1
        out, err = capsys.readouterr()
        assert f"`dattrain data pack {source} OUT`" in out + err


def test_damaged_and_mixed_releases_are_named(release, tmp_path):
    data = (release / f"{SYNSETS[2]}.tar").read_bytes()
    (release / f"{SYNSETS[2]}.tar").write_bytes(data[:3072])
    with pytest.raises(UserError, match=rf"{SYNSETS[2]}.tar: .*cut short"):
        open_source(str(release))
    with pytest.raises(UserError, match=rf"{SYNSETS[2]}.tar in .*whole.tar: .*cut short"):
        open_source(str(whole(release, "")))
    mixed = write_tar(tmp_path / "mixed.tar", [(f"{SYNSETS[0]}.tar", tar.END), ("words.txt", b"")])
    with pytest.raises(UserError, match=r"holds 'words.txt' \(file\) among the tars"):
        open_source(str(mixed))
    double = write_tar(tmp_path / "double.tar", [(f"{x}/{SYNSETS[0]}.tar", tar.END) for x in "ab"])
    with pytest.raises(UserError, match=f"{SYNSETS[0]}.tar comes twice"):
        open_source(str(double))
    with pytest.raises(UserError, match="hold no images"):
        open_source(str(write_tar(tmp_path / "none.tar", [(f"{SYNSETS[0]}.tar", tar.END)])))


def test_shards_that_are_called_by_synset_stay_shards(tmp_path):
    """They have labels, or an index."""
    write_tar(tmp_path / f"{SYNSETS[0]}.tar", [("a.jpg", b"1"), ("a.cls", b"3")])
    assert find(str(tmp_path)) is None
    assert main(["data", "index", str(tmp_path), "--jobs", "1"]) == 0
    assert open_dataset(str(tmp_path)).label(0, 0) == 3


def test_what_is_no_image_is_counted(release, tmp_path, capsys, jpegs):
    write_tar(
        release / f"{SYNSETS[1]}.tar",
        [("a.JPEG", jpegs[0]), ("notes.txt", b""), ("b.heic", b"x"), ("._a.JPEG", b"")],
    )
    assert main(["data", "pack", str(release), str(tmp_path / "out"), "--jobs", "1"]) == 1
    assert "2 members left out: 1 .heic (b.heic), 1 .txt (notes.txt)" in capsys.readouterr().err


def test_an_extraction_that_was_stopped(release):
    for synset in SYNSETS[:2]:
        (release / synset).mkdir()
        assert len(find(str(release))) == 3, "extracted, and the tar is there still"
    (release / f"{SYNSETS[1]}.tar").unlink()
    with pytest.raises(
        UserError, match=rf"tars of 2 classes, and 1 other classes as folders \({SYNSETS[1]}\)"
    ):
        open_source(str(release))


def test_classes_without_images_are_told(release):
    assert open_source(str(release)).notes == (
        f"{release}: the tars of 1 classes hold no images: {SYNSETS[1]}",
    )


def test_class_folders_in_one_tar(tmp_path, jpegs, capsys):
    """As ImageNet-21K-P is given out."""
    write_tar(tmp_path / "p.tar", [(f"imagenet21k_train/{n}/{n}_0.JPEG", jpegs[0]) for n in SYNSETS])
    assert main(["data", "index", str(tmp_path / "p.tar"), "--jobs", "1"]) == 0
    assert "where its folder is its class, extract the tar and pack the folder" in capsys.readouterr().err
