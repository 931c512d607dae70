"""The type of ``--run``."""

from __future__ import annotations

import argparse
from pathlib import Path


def run_folder(word: str) -> Path:
    """A folder's name; an empty one, as of a shell variable that is not set, would be the working folder."""
    if not word.strip():
        raise argparse.ArgumentTypeError("names no folder (a variable that is not set?)")
    return Path(word)
