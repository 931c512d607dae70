"""Shared by all tests: one thread per process, the switches, the time limits, and the one place that skips what needs a
GPU."""

import faulthandler
import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Servers of tests are on loopback, whatever proxy this machine goes through.
os.environ["no_proxy"] = "localhost,127.0.0.1"


LIMITS = {"dist": 1800, "e2e": 3600, "slurm": 3600}
"""Seconds for a test of these folders and the fixtures that it is the first to need (a Slurm is installed and started, and
runs a recipe); pyproject.toml has the limit of the others."""
FULL_LIMIT = 4 * 3600
GRACE = 60
"""Seconds after its limit until a test is ended that the signal did not end."""
# pytest's capture stands before descriptor 2 while tests run, and loses what it holds when the process exits.
STDERR = pytest.StashKey()


def pytest_configure(config):
    config.stash[STDERR] = os.dup(2)


@pytest.hookimpl(wrapper=True)
def pytest_timeout_set_timer(item, settings):
    """The signal fails a test in good order, with its fixtures torn down, once the main thread runs Python again. Where it
    never does (a wait inside C), this prints every stack and ends the process: xdist reports the test as failed."""
    faulthandler.dump_traceback_later(settings.timeout + GRACE, exit=True, file=item.config.stash[STDERR])
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_timeout_cancel_timer(item):
    faulthandler.cancel_dump_traceback_later()
    return (yield)


@pytest.fixture(scope="module", autouse=True)
def _no_rank_is_left():
    """Or what the tests after these start would take itself for a rank."""
    yield
    assert "RANK" not in os.environ


def pytest_addoption(parser):
    parser.addoption("--freeze-help", action="store_true", help="rewrite tests/assets/help")
    parser.addoption("--full", action="store_true", help="run the long matrix too")


def pytest_runtest_setup(item):
    if "gpu" in item.keywords:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no NVIDIA GPU")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A file is one worker's, and so is the one Slurm of tests/slurm: it mostly waits, beside workers that compute."""
    from xdist.scheduler import LoadFileScheduling

    class ByFileAndSlurm(LoadFileScheduling):
        def _split_scope(self, nodeid):
            return "tests/slurm" if nodeid.startswith("tests/slurm/") else super()._split_scope(nodeid)

    return ByFileAndSlurm(config, log) if config.getoption("dist") == "loadfile" else None


def pytest_collection_modifyitems(config, items):
    here = Path(__file__).parent
    # What takes longest starts first (with --no-loadscope-reorder), so that workers end together.
    items.sort(key=lambda item: not item.path.is_relative_to(here / "slurm"))
    for item in items:
        limit = LIMITS.get(item.path.relative_to(here).parts[0]) if here in item.path.parents else None
        if "full" in item.keywords:
            limit = FULL_LIMIT
        if limit is not None and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(limit))
    if config.getoption("--full"):
        return
    long = [item for item in items if "full" in item.keywords]
    config.hook.pytest_deselected(items=long)
    items[:] = [item for item in items if "full" not in item.keywords]
