"""Shared by all tests: one thread per process, the switches, and the one place that skips what needs a GPU."""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser):
    parser.addoption("--freeze-help", action="store_true", help="rewrite tests/assets/help")
    parser.addoption("--full", action="store_true", help="run the long matrix too")


def pytest_runtest_setup(item):
    if "gpu" in item.keywords:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no NVIDIA GPU")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--full"):
        return
    long = [item for item in items if "full" in item.keywords]
    config.hook.pytest_deselected(items=long)
    items[:] = [item for item in items if "full" not in item.keywords]
