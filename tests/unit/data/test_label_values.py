"""Labels as people write them: a number, or one line that shows what was seen."""

from __future__ import annotations

import re

import pytest
from pictures import write_tar

from dattrain.data.source.build_index import build
from dattrain.data.source.index import NO_LABEL
from dattrain.errors import UserError


def shard(tmp_path, extension: str, content: bytes) -> str:
    return str(write_tar(tmp_path / "t.tar", [("a.jpg", b"1"), (f"a.{extension}", content)]))


@pytest.mark.parametrize(
    ("extension", "content"),
    [
        ("cls", b" 7\r\n"),
        ("cls", b"7.0"),
        ("cls", b"0007"),
        ("cls", b"\xef\xbb\xbf7"),
        ("json", b'{"label": 7.0}'),
        ("json", b'{"label": " 7"}'),
        ("json", b'{"label": "7.0"}'),
        ("json", b'{"label": null, "cls": 7}'),
        ("json", '{"label": 7}'.encode("utf-16")),
    ],
)
def test_the_number_seven(tmp_path, extension, content):
    assert build(shard(tmp_path, extension, content)).labels.tolist() == [7]


@pytest.mark.parametrize(
    ("extension", "content", "message"),
    [
        ("cls", b"9" * 5000, "label 9+ is larger than"),
        ("cls", b"99999999999999999999", "label 9+ is larger than"),
        ("cls", b"16777216", "label 16777216 is larger than 16,777,215"),
        ("cls", "²".encode(), r"holds b'\\xc2\\xb2', not a number"),
        ("cls", b"", "holds b'', not a number"),
        ("cls", b"7" + b" " * 9000, "not a number"),
        ("cls", b"\xff\0", "not a number"),
        ("json", b'{"label": 1' + b"0" * 20 + b"}", "label 1000000+ is larger than"),
        ("json", b'{"label": 1e300}', "is larger than"),
        ("json", b'{"label": -1.0}', "label -1 is negative"),
        ("json", b'{"label": ' + b"9" * 5000 + b"}", "does not parse"),
        ("json", b'{"label": ' + b"[" * 100_000 + b"}", "does not parse"),
        ("json", b"\xff\xfe\xfd", "does not parse"),
    ],
)
def test_what_cannot_be_a_class_number_names_shard_key_and_offset(tmp_path, extension, content, message):
    with pytest.raises(UserError, match=rf"t.tar: sample 'a' at offset 1536: .*{message}") as error:
        build(shard(tmp_path, extension, content))
    assert len(str(error.value)) < 500 + len(str(tmp_path))


@pytest.mark.parametrize(
    ("value", "seen"),
    [
        ('"n01440764"', "label 'n01440764', not a number"),
        ("[7]", r"label \[7\], not a number"),
        ("true", "label True, not a number"),
        ("NaN", "label nan, not a number"),
        ("Infinity", "label inf, not a number"),
        ("7.5", "label 7.5, not a number"),
        ('"²"', "label '²', not a number"),
        ('"1_000"', "label '1_000', not a number"),
        ("[" * 500 + "]" * 500, "label .*, not a number"),
        ("null", "none of label, cls, class_id"),
    ],
)
def test_other_values_are_no_label_and_are_shown(tmp_path, value, seen):
    path = shard(tmp_path, "json", f'{{"label": {value}}}'.encode())
    index = build(path)
    assert index.labels.tolist() == [NO_LABEL]
    assert re.fullmatch(rf"its .json has {seen}", index.why["a"])
    with pytest.raises(UserError, match="its .json has no integer field 'label'"):
        build(path, label="label")


def test_streams_read_labels_by_the_same_rule():
    from dattrain.data.stream import _label

    sample = {"__url__": "t.tar", "__key__": "a"}
    assert _label({**sample, "cls": b"7.0\n"}) == _label({**sample, "json": b'{"label": "7"}'}) == 7
    assert _label({**sample, "json": b'{"label": "dog"}'}) is _label(sample) is None
    for bad in ({"cls": b"dog"}, {"cls": b"-1"}, {"json": b"{"}, {"json": b'{"label": 1e99}'}):
        with pytest.raises(UserError, match=r"t.tar: sample 'a'"):
            _label({**sample, **bad})
