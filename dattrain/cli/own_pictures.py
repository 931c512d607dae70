"""The pictures that ``dattrain predict`` writes: known from those of others, which are neither written over nor taken for photographs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dattrain.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

_SOFTWARE = "dattrain predict"
"""In the pictures' text."""


def names(out: Path, files: Sequence[Path], endings: Sequence[str]) -> list[str]:
    """A stem for each file; what is written is ``out / f"{stem}{ending}"``.

    Raises:
        UserError: something is there that is not ours, or a file is one of our pictures.
    """
    from dattrain.cli.viz import unique_names

    stems = unique_names(files)
    targets = [out / f"{stem}{ending}" for stem in stems for ending in endings]
    if foreign := next((each for each in targets if each.exists() and not _is_ours(each)), None):
        raise UserError(
            f"--out {out}: {foreign} is there, and predict did not write it; name another folder", exit_code=2
        )
    if again := next((file for file in files if _is_ours(file)), None):
        raise UserError(
            f"{again}: is a picture that predict wrote; name the pictures that it was made of", exit_code=2
        )
    return stems


def save(path: Path, image: Image) -> None:
    """Write a PNG that is known for ours. Raises UserError where it cannot be written."""
    from PIL.PngImagePlugin import PngInfo

    mark = PngInfo()
    mark.add_text("Software", _SOFTWARE)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, pnginfo=mark)
    except OSError as error:
        raise UserError(f"--out {path.parent}: cannot be written ({error.strerror})", exit_code=2) from error


def _is_ours(path: Path) -> bool:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.info.get("Software") == _SOFTWARE
    except (OSError, ValueError, Image.DecompressionBombError):
        return False
