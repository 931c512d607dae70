"""Shared by all tests: one thread per process, and the switch that rewrites the frozen help."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser):
    parser.addoption("--freeze-help", action="store_true", help="rewrite tests/assets/help")
    parser.addoption("--full", action="store_true", help="run the long matrix too")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--full"):
        return
    long = [item for item in items if "full" in item.keywords]
    config.hook.pytest_deselected(items=long)
    items[:] = [item for item in items if "full" not in item.keywords]
