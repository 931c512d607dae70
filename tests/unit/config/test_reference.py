"""Types and keys as people read them."""

from typing import Annotated, Literal

import pytest
from pydantic import Field

from dattrain.cli.main import main
from dattrain.config import reference
from dattrain.config.sections import Progressive


@pytest.mark.parametrize(
    ("annotation", "text"),
    [
        (int, "int"),
        (Annotated[int, Field(ge=1)], "int >= 1"),
        (Annotated[int, Field(ge=1)] | None, "int >= 1 or null"),
        (Annotated[float, Field(gt=0, le=1)], "float > 0 and <= 1"),
        (Annotated[int, Field(ge=2, multiple_of=2)], "int >= 2 and a multiple of 2"),
        (Literal["a", "b"] | None, "`a` or `b` or null"),
        (int | tuple[int, int], "int or [int, int]"),
        (tuple[Progressive, ...], "list of {epoch, img_size}"),
        (dict[str, object], "mapping"),
    ],
)
def test_types_are_readable(annotation, text):
    assert reference.readable(annotation) == text


def test_no_type_of_a_key_shows_how_it_is_written_in_python():
    for key in reference.all_keys():
        assert not any(word in key.type for word in ("typing", "Literal", "Optional", "<class", "Any")), key
        assert "FieldInfo" not in key.type


def test_a_filter_finds_by_key_by_meaning_and_by_habit(capsys):
    assert main(["config", "keys", "mixup"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("augment.mixup=0.8  (float >= 0)\n    Alpha of the Beta")
    assert main(["config", "keys", "num_workers"]) == 0
    assert capsys.readouterr().out.startswith("data.workers=4  (int >= 0)\n")
    assert main(["config", "keys", "zzz"]) == 2
    assert "no key of a recipe has to do with 'zzz'" in capsys.readouterr().err
