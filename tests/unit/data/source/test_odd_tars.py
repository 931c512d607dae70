"""Tars as other programs and accidents make them: nothing in them is lost without a word."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
from pictures import encode, write_tar
from PIL import Image

from dattrain.cli.main import main
from dattrain.data.prepare.index_shards import index_shards
from dattrain.data.source import tar
from dattrain.data.source.build_index import build
from dattrain.data.source.dataset import BadSample, open_dataset
from dattrain.errors import UserError

PICTURES = [("0.jpg", b"zero"), ("0.cls", b"0"), ("1.jpg", b"first"), ("1.cls", b"1")]


def member(name: str, kind: bytes, content: bytes = b"", link: str = "") -> bytes:
    """A member of any type, in USTAR."""
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, len(content), link
    return info.tobuf(tarfile.USTAR_FORMAT) + content + tar.padding(len(content))


def plain(*members: tuple[str, bytes]) -> bytes:
    return b"".join(tar.header(n, len(d)) + d + tar.padding(len(d)) for n, d in members)


def record(key: str, value: str) -> bytes:
    body = f" {key}={value}\n".encode()
    length = len(body) + 1
    while len(str(length)) + len(body) != length:
        length += 1
    return b"%d%b" % (length, body)


def shard(path: Path, *parts: bytes, end: bytes = tar.END) -> str:
    path.write_bytes(b"".join(parts) + end)
    return str(path)


def test_a_hard_link_is_the_file_it_names(tmp_path):
    path = shard(
        tmp_path / "t.tar",
        plain(("./blob", b"shared"), *PICTURES),
        member("2.jpg", tarfile.LNKTYPE, link="./1.jpg"),
        plain(("2.cls", b"2")),
        member("3.jpg", tarfile.LNKTYPE, link="blob"),
        plain(("3.cls", b"3")),
    )
    index_shards([path])
    dataset = open_dataset(path)
    found = [(dataset.read(0, i).data, dataset.label(0, i)) for i in range(4)]
    assert found == [(b"zero", 0), (b"first", 1), (b"first", 2), (b"shared", 3)]
    with tarfile.open(path) as file:
        assert file.extractfile("2.jpg").read() == b"first"
    assert dataset.index(0).linked.tolist() == [False, False, True, True]


def test_verifying_knows_hard_links(tmp_path, jpegs, capsys):
    path = shard(
        tmp_path / "t.tar",
        plain(("1.jpg", jpegs[0]), ("1.cls", b"1")),
        member("2.jpg", tarfile.LNKTYPE, link="1.jpg"),
        plain(("2.cls", b"2")),
    )
    assert main(["data", "index", path, "--jobs", "1"]) == 0
    assert main(["data", "verify", path, "--jobs", "1"]) == 0
    assert "2 samples" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("extra", "kind"),
    [
        (member("2.jpg", tarfile.SYMTYPE, link="1.jpg"), "symbolic link"),
        (member("2.jpg", tarfile.LNKTYPE, link="9.jpg"), "hard link to '9.jpg', which is no file before it"),
        (member("2.jpg", tarfile.FIFOTYPE), "FIFO"),
        (member("2.jpg", tarfile.CHRTYPE), "device"),
        (member("2.jpg", tarfile.GNUTYPE_SPARSE, b"x" * 700), "sparse file"),
        (
            member("x", tarfile.XHDTYPE, record("GNU.sparse.major", "1") + record("GNU.sparse.name", "2.jpg"))
            + plain(("GNUSparseFile.7/2", b"1\n0\n5\n")),
            "sparse file",
        ),
        (member("2.jpg", b"M", b"rest"), "part of a file on several volumes"),
        (member("2.jpg", b"Q", b"what"), "member of type 'Q'"),
    ],
)
def test_members_that_are_no_files_are_named_counted_and_exit_1(tmp_path, capsys, extra, kind):
    path = shard(tmp_path / "t.tar", plain(*PICTURES), extra, plain(("2.cls", b"2"), ("3.jpg", b"later")))
    for _ in range(2):  # the index remembers
        assert main(["data", "index", path, "--jobs", "1"]) == 1
        err = capsys.readouterr().err
        assert f"1 members left out: 1 {kind} (2.jpg)" in err and f"2.jpg, a {kind}" in err
    dataset = open_dataset(path)
    assert [dataset.read(0, i).data for i in (0, 1, 3)] == [b"zero", b"first", b"later"]
    with pytest.raises(BadSample, match=r"'2' has no image member \(it has 2.jpg, a "):
        dataset.read(0, 2)


@pytest.mark.skipif(shutil.which("tar") is None, reason="GNU tar makes the holes")
@pytest.mark.parametrize("format", ["gnu", "posix"])
def test_holes_of_gnu_tar_are_no_pixels(tmp_path, format):
    """A map of holes too long for one header, too: the members behind it are found."""
    for i, pieces in enumerate((1, 40)):
        with open(tmp_path / f"{i}.bmp", "wb") as file:
            for piece in range(pieces):
                file.seek(piece << 16)
                file.write(b"BM" * 2048)
            file.truncate(pieces << 16)
    (tmp_path / "2.bmp").write_bytes(encode(Image.fromarray(np.zeros((4, 4, 3), np.uint8)), "BMP"))
    names = [f"{i}.bmp" for i in range(3)]
    subprocess.run(
        ["tar", f"--format={format}", "--sparse", "-cf", tmp_path / "t.tar", "-C", tmp_path, *names],
        check=True,
    )
    index = build(str(tmp_path / "t.tar"))
    assert [(some.kind, some.count, some.lost) for some in index.left_out] == [("sparse file", 2, True)]
    assert [index.key(i) for i in range(len(index))] == ["0", "1", "2"] and (index.offsets > 0).tolist() == [
        False,
        False,
        True,
    ]


def test_data_behind_the_end_is_an_error(tmp_path):
    """Two tars joined by cat, a lone zero block in the middle, junk after the end; zeros alone are padding."""
    one, two = plain(*PICTURES), plain(("2.jpg", b"x"), ("2.cls", b"2"))
    for content in (one + tar.END + two + tar.END, one + bytes(512) + two + tar.END, one + tar.END + b"x"):
        (tmp_path / "t.tar").write_bytes(content)
        with pytest.raises(
            UserError, match=rf"zeros at offset {len(one)} .* data after it, .*--ignore-zeros"
        ):
            build(str(tmp_path / "t.tar"))
    for content in (one + bytes(512), one + bytes(10240), one + bytes(3 << 20)):
        (tmp_path / "t.tar").write_bytes(content)
        assert len(build(str(tmp_path / "t.tar"))) == 2


@pytest.mark.parametrize(
    "content",
    [
        b"0 path=a.jpg\n",
        b"path=a.jpg\n",
        b"-5 path=a.jpg\n",
        b"\n",
        b"6 abc\n",
        b"99 path=a\n",
        b"12 path=a.j",
    ]
    + [b"9" * 5000 + b" path=a\n", record("size", "-1"), record("size", "many"), record("size", "9" * 30)],
)
def test_malformed_extended_headers_are_one_line(tmp_path, content):
    head = plain(*PICTURES)
    path = shard(tmp_path / "t.tar", head, member("x", tarfile.XHDTYPE, content), plain(("2.jpg", b"x")))
    with pytest.raises(UserError, match=rf"t.tar: the extended header at offset {len(head)} "):
        build(path)


def test_extended_headers_say_name_and_size(tmp_path):
    """A size above 8 GiB stands there alone (as Python writes it); PAX names go before GNU's; zeros may pad records."""
    info = tarfile.TarInfo("big.bin")
    info.size = 9 << 30
    head = plain(*PICTURES) + info.tobuf(tarfile.PAX_FORMAT)
    with open(tmp_path / "t.tar", "wb") as file:
        file.write(head)
        file.seek(info.size, os.SEEK_CUR)
        file.write(
            member("x", tarfile.XHDTYPE, record("path", "pax.jpg") + bytes(20))
            + member("././@LongLink", tarfile.GNUTYPE_LONGNAME, b"gnu.jpg\0")
            + plain(("short", b"x"))
            + member("g", tarfile.XGLTYPE, record("comment", "0123"))
            + plain(("last.jpg", b"y"))
            + tar.END
        )
    members = list(tar.scan(str(tmp_path / "t.tar")))
    assert [m.name for m in members[4:]] == ["big.bin", "pax.jpg", "last.jpg"]
    assert members[4].size == 9 << 30


def test_negative_sizes_do_not_go_back(tmp_path):
    """A header whose checksum is right and whose size is -512 would be read for ever."""
    header = bytearray(tar.header("0.jpg", 0))
    header[124:136] = b"-0000001000\0"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    with pytest.raises(UserError, match="no tar header at offset 0"):
        build(shard(tmp_path / "t.tar", bytes(header)))


@pytest.mark.parametrize(
    ("magic", "message"),
    [
        (b"\x1f\x8b\x08", "gzip: gunzip it"),
        (b"\x28\xb5\x2f\xfd", "zstd: unzstd"),
        (b"\xfd7zXZ\0", "xz: unxz"),
        (b"BZh9", "bzip2: bunzip2"),
    ],
)
def test_compressed_tars_are_named(tmp_path, magic, message):
    with pytest.raises(UserError, match=f"no tar header at offset 0; it is compressed by {message}"):
        build(shard(tmp_path / "t.tar", magic + bytes(2000)))


@pytest.mark.parametrize("name", ["t-0000.tar.gz", "t-0000.tgz", "t-0000.tar.zst"])
def test_folders_with_compressed_tars_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(bytes(2000))
    for spec in (tmp_path, tmp_path / name):
        with pytest.raises(UserError, match=f"{name}.* is compressed.* gunzip"):
            open_dataset(str(spec))
    write_tar(tmp_path / "t-0001.tar", PICTURES)
    with pytest.raises(UserError, match=f"{name} is compressed"):
        open_dataset(str(tmp_path))
    write_tar(tmp_path / "t-0000.tar", PICTURES)
    index_shards([str(tmp_path / f"t-000{i}.tar") for i in range(2)])
    assert open_dataset(str(tmp_path)).counts.tolist() == [2, 2], "unpacked beside it"
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.jpg").write_bytes(b"x")
    for path in tmp_path.glob("*.tar"):
        path.rename(tmp_path / "a" / path.name)
    (tmp_path / "_catalogue.json").unlink()
    assert open_dataset(str(tmp_path)).max_label == 0, "the class folders that it was unpacked to"


@pytest.mark.timeout(60)
def test_fifos_are_no_files(tmp_path, capsys):
    """A shard, an index, a catalogue: opening one would wait for a writer for ever."""
    write_tar(tmp_path / "t-0000.tar", PICTURES)
    os.mkfifo(tmp_path / "t-0001.tar")
    for verb in ("index", "verify"):
        assert main(["data", verb, str(tmp_path), "--jobs", "1"]) == 1
        out, err = capsys.readouterr()
        assert "t-0001.tar: cannot be read (it is a FIFO, not a file)" in out + err
    os.unlink(tmp_path / "t-0001.tar")
    for name in ("_info.json", "_catalogue.json", "t-0000.index.npz"):
        (tmp_path / name).unlink(missing_ok=True)
        os.mkfifo(tmp_path / name)
        with pytest.raises(UserError, match=rf"{name}: cannot be read \(it is a FIFO, not a file\)"):
            open_dataset(str(tmp_path))
        os.unlink(tmp_path / name)


def test_unread_extensions_are_counted_by_kind(tmp_path, capsys):
    path = write_tar(
        tmp_path / "t.tar",
        [("0.heic", b"x"), ("0.cls", b"0"), ("README", b""), ("._1.jpg", b"")]
        + [(f"{i}.{x}", b"1") for i in (1, 2) for x in ("jpg", "cls", "txt")],
    )
    assert main(["data", "index", str(path), "--jobs", "1"]) == 1, "a picture is lost"
    err = capsys.readouterr().err
    assert "4 members left out: 1 .heic (0.heic), 2 .txt (1.txt, ...), 1 without extension (README)" in err
    write_tar(path, [(f"1.{x}", b"1") for x in ("jpg", "cls", "txt")])
    assert main(["data", "index", str(path), "--jobs", "1", "--force"]) == 0, "a caption is none"
    assert "1 members left out: 1 .txt (1.txt)" in capsys.readouterr().err


def test_members_can_be_chosen(tmp_path, capsys):
    path = str(
        write_tar(
            tmp_path / "t.tar",
            [
                ("s.input.jpg", b"in"),
                ("s.seg.png", b"seg"),
                ("s.output.cls", b"3"),
                ("s.json", b'{"label": 5}'),
            ],
        )
    )
    with pytest.raises(UserError, match=r"has 2 images \(s.input.jpg, s.seg.png\).* first dot; `--image"):
        build(path)
    assert main(["data", "index", path, "--jobs", "1", "--image", "input.jpg", "--label", "output.cls"]) == 0
    dataset = open_dataset(path)
    assert (dataset.read(0, 0).data, dataset.label(0, 0)) == (b"in", 3)
    assert main(["data", "index", path, "--jobs", "1", "--image", "seg.png"]) == 0, (
        "an index that is there is made anew"
    )
    dataset = open_dataset(path)
    assert (dataset.read(0, 0).data, dataset.label(0, 0)) == (b"seg", 5)
    write_tar(tmp_path / "t.tar", [("2.0.jpg", b"x"), ("2.0.cls", b"1")])
    capsys.readouterr()
    main(["data", "index", path, "--force", "--jobs", "1"])
    assert "2 (it has 2.0.jpg; 2.0.cls; keys end at the first dot)" in capsys.readouterr().err
