"""Triton's interpreter (TRITON_INTERPRET=1), and where it cannot run."""

from __future__ import annotations

from importlib.metadata import version

import pytest
from packaging.version import Version

RUNS = Version(version("triton")) >= Version("3.7") or Version(version("numpy")) < Version("2.4")
"""Triton 3.6's takes an array of one element for a number, which numpy 2.4 refuses."""

needs_interpreter = pytest.mark.skipif(not RUNS, reason="Triton 3.6's interpreter needs numpy < 2.4")
