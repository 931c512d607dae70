"""``python launch/submit.py CONFIG …``: the same as ``dattrain submit``, for a checkout that is not installed."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from dattrain.cli.main import main

    sys.exit(main(["submit", *sys.argv[1:]]))
