"""The task that a recipe means."""

from __future__ import annotations

from dattrain.config.schema import Config
from dattrain.tasks.base import Task
from dattrain.tasks.classification import Classification
from dattrain.tasks.detection import Detection
from dattrain.tasks.segmentation import Segmentation


def create_task(config: Config) -> Task:
    """Make the task that ``task.kind`` names. Raises ConfigError for settings that it cannot use."""
    if config.task.kind == "detection":
        return Detection(config)
    return Segmentation(config) if config.task.kind == "segmentation" else Classification(config)
