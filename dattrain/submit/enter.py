"""Run a module of the snapshot that this file lies in: ``python enter.py [-u] -m MODULE [ARGUMENT ...]``.

``python -m`` looks into the working folder first, before PYTHONPATH. A job's working folder is where it was submitted, often
the very checkout that goes on being edited, so its code would come in place of the snapshot's. Standard library alone,
Python >= 3.8; an older one, as the ``python`` of a container may be, gets as far as saying so.
"""

import runpy
import sys
from pathlib import Path
from typing import Sequence  # noqa: UP035 (Python 3.8 runs this file)


def main(words: Sequence[str]) -> None:
    """Become the module, as ``python -m`` would, but for the path."""
    if sys.version_info < (3, 8):  # noqa: UP036 (this file is what tells)
        version = ".".join(map(str, sys.version_info[:3]))
        sys.exit(f"dattrain: {sys.executable} is Python {version}; it has to be 3.8 or newer")
    if words[0] == "-u":
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(line_buffering=True, write_through=True)  # type: ignore[union-attr]
        words = words[1:]
    assert words[0] == "-m", words
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    sys.argv = list(words[1:])
    runpy.run_module(words[1], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
