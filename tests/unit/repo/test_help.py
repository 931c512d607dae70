"""Each verb's ``--help`` is frozen: a change of the public surface is a change of this file's asset, seen in review.

``python -m pytest tests/unit/repo/test_help.py --freeze-help`` rewrites it.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dattrain.cli.main import VERBS

ASSET = Path(__file__).parents[2] / "assets" / "help"


def help_of(*words: str) -> str:
    code = "import sys; from dattrain.cli.main import main; sys.exit(main(sys.argv[1:]))"
    env = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1", "PYTHON_COLORS": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code, *words, "--help"], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(
    sys.version_info[:2] != (3, 11), reason="argparse words its help differently in each Python"
)
@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_is_frozen(verb, request):
    text = help_of(*([verb] if verb else []))
    file = ASSET / f"{verb or 'dattrain'}.txt"
    if request.config.getoption("--freeze-help"):
        ASSET.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert text == file.read_text()
