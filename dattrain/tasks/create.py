"""The task that a recipe means."""

from __future__ import annotations

from collections.abc import Callable

from dattrain.config.schema import Config
from dattrain.tasks.base import Task
from dattrain.tasks.classification import Classification
from dattrain.tasks.detection import Detection
from dattrain.tasks.segmentation import Segmentation


def create_task(config: Config) -> Task:
    """Make the task that ``task.kind`` names. Raises ConfigError for settings that it cannot use."""
    kinds: dict[str, Callable[[Config], Task]] = {
        "classification": Classification,
        "segmentation": Segmentation,
        "detection": Detection,
    }
    return kinds[config.task.kind](config)
