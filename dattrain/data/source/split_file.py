"""A part of an image folder, as a file that lists it: what was held out of a folder, and what was left.

JSON: ``root``, the folder, absolute or relative to the file's own; ``classes``, for each class in the order of its label the
paths of its images below the root. A folder that gets more images later leaves a run's sets as they were.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from dattrain.config.load import SPLIT_SUFFIX
from dattrain.data.source.folders import FolderDataset
from dattrain.errors import UserError
from dattrain.files import write_text

SUFFIX = SPLIT_SUFFIX


class SplitDataset(FolderDataset):
    """The images that a split file lists; order and identity are those of a folder with these files alone.

    Raises:
        UserError: no such file; its folder is gone; it lists nothing.
    """

    def __init__(self, path: str) -> None:
        root, classes = read(path)
        self._take(path, root, list(classes), _labelled(classes))


def write(path: Path, root: Path, classes: Mapping[str, Sequence[str]]) -> None:
    """List images of ``root`` by class. Raises OSError."""
    content = {"root": str(root.absolute()), "classes": classes}
    write_text(path, json.dumps(content, indent=0) + "\n")


def read(path: str | Path) -> tuple[Path, dict[str, list[str]]]:
    """Root and images by class of a split file; raises UserError as ``SplitDataset``."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        root, classes = Path(path).parent / content["root"], dict(content["classes"])
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: lists no images by class ({type(error).__name__}: {error})") from error
    if not root.is_dir():
        raise UserError(
            f'{path}: lists images of {root}, which is not there; write where they are now as its "root"'
        )
    return root, classes


def _labelled(classes: Mapping[str, Sequence[str]]) -> list[tuple[int, str]]:
    return [(label, file) for label, files in enumerate(classes.values()) for file in files]
