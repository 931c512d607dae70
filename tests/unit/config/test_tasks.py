"""What a recipe says that its task would not do is refused."""

import pytest

from dattrain.config.derive import derive
from dattrain.config.load import load
from dattrain.errors import ConfigError

SEGMENTATION = "base/segmentation.yaml"


@pytest.mark.parametrize(
    "setting",
    (
        "task.norm=group", "geometry.crop=64", "eval.flip=true", "eval.scales=[0.5,1.0]",
        "schedule.updates=10", "schedule.warmup_updates=3",
    ),
)  # fmt: skip
def test_settings_of_another_task_are_refused(setting):
    with pytest.raises(ConfigError, match=setting.partition("=")[0].replace(".", r"\.")):
        load("model/dat_tiny.yaml", [setting])


@pytest.mark.parametrize(
    "setting",
    (
        "augment.mixup=0.8", "augment.randaugment=rand-m9", "augment.label_smoothing=0.1", "eval.batch=2",
        "data.reader=webdataset", "eval.stride=64", "geometry.scale=[2.0,0.5]", "eval.scales=[]", "model.num_classes=256",
    ),
)  # fmt: skip
def test_settings_of_classification_are_refused(setting):
    with pytest.raises(ConfigError):
        load(SEGMENTATION, [setting])


def test_a_schedule_in_updates():
    config = load(
        SEGMENTATION, ["schedule.updates=100", "schedule.warmup_updates=7", "eval.every_steps=20"]
    ).config
    found = derive(config, world=1, samples_per_epoch=4096)
    assert (found.total_steps, found.warmup_steps, found.eval_steps) == (100, 7, 20)
    assert config.schedule.length == "100 updates"
    with pytest.raises(ConfigError, match="longer"):
        load(SEGMENTATION, ["schedule.updates=5", "schedule.warmup_updates=7"])
