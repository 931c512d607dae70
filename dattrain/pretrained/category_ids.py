"""What the file that a detector was trained on calls the network's classes: the ids of its categories."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from dattrain.data import factory
from dattrain.data.annotations import detection
from dattrain.data.source.dataset import open_dataset
from dattrain.errors import UserError
from dattrain.pretrained.pretrained_cfg import PretrainedCfg, classes_of
from dattrain.pretrained.weights import config_of


def of_training(path: str | Path, cfg: PretrainedCfg) -> tuple[list[int], str] | None:
    """Ids by class number, and the ``data.train`` that says them; None where it is not there any more, or never was told.

    A weights file does not know them. Sets at URLs are not opened for this.

    Args:
        path: of a detector, as ``load_model`` takes it.
        cfg: as ``load_model`` gives it beside the model.
    """
    config = config_of(path)
    if config is None or config.data.train is None or "://" in config.data.train:
        return None
    try:
        with closing(open_dataset(config.data.train)) as dataset:
            factory.assign_class_numbers(config, "train", dataset, classes_of(cfg))
            found = detection.category_ids(dataset, cfg.num_classes)
    except UserError:  # the data are elsewhere now, or others
        return None
    ids = [each for each in found if each is not None]
    return (ids, config.data.train) if len(ids) == len(found) else None
