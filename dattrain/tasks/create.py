"""The task that a recipe means."""

from __future__ import annotations

from dattrain.config.schema import Config
from dattrain.tasks.base import Task
from dattrain.tasks.classification import Classification


def create_task(config: Config) -> Task:
    """Make the task of ``config``: classification, the only one so far."""
    return Classification(config)
