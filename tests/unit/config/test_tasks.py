"""What a recipe says that its task would not do is refused."""

import pytest

from dattrain.config.derive import derive
from dattrain.config.load import load
from dattrain.errors import ConfigError

SEGMENTATION, DETECTION = "base/segmentation.yaml", "base/detection.yaml"


@pytest.mark.parametrize(
    "setting",
    (
        "task.norm=group", "geometry.crop=64", "eval.flip=true", "eval.scales=[0.5,1.0]",
        "schedule.updates=10", "eval.max_detections=10",
    ),
)  # fmt: skip
def test_settings_of_another_task_are_refused(setting):
    with pytest.raises(ConfigError, match=setting.partition("=")[0].replace(".", r"\.")):
        load("model/dat_tiny.yaml", [setting])


@pytest.mark.parametrize(
    "setting",
    (
        "augment.mixup=0.8", "augment.randaugment=rand-m9", "augment.label_smoothing=0.1", "eval.batch=2",
        "augment.crop_scale=[0.5,1.0]", "augment.crop_ratio=[1.0,1.0]", "eval.resize=squash", "eval.crop_pct=0.9",
        "geometry.long_side=256", "geometry.short_side=16", "geometry.crop=16", "geometry.crop=0",
        "data.reader=webdataset", "eval.stride=64", "geometry.scale=[2.0,0.5]", "eval.scales=[]", "model.num_classes=256",
        "task.head=retinanet", "geometry.short_sides=[64]", "geometry.copy_paste=0.5", "eval.score_threshold=0.1",
    ),
)  # fmt: skip
def test_settings_of_classification_are_refused(setting):
    with pytest.raises(ConfigError, match=setting.partition("=")[0].replace(".", r"\.")):
        load(SEGMENTATION, [setting])


@pytest.mark.parametrize(
    "setting",
    (
        "task.head=upernet", "task.dropout=0.5", "geometry.max_class_share=0.5", "eval.mode=slide", "eval.flip=true", "eval.batch=2",
        "augment.mixup=0.8", "geometry.short_sides=[1400]", "geometry.precrop_sides=[600,384]", "geometry.precrop_sides=[16,384]",
    ),
)  # fmt: skip
def test_settings_of_other_tasks_are_refused_in_detection(setting):
    with pytest.raises(ConfigError, match=setting.partition("=")[0].rpartition(".")[2]):
        load(DETECTION, [setting])
    with pytest.raises(ConfigError, match="retinanet has no regions"):
        load(DETECTION, ["task.head=retinanet", "task.region_samples=64"])
    assert load(DETECTION, ["model.num_classes=1203"]).config.model.num_classes == 1203


@pytest.mark.parametrize(
    "settings",
    (
        ["schedule.milestones=[8,11]"], ["schedule.kind=step"], ["schedule.kind=step", "schedule.milestones=[11,8]"],
        ["schedule.kind=step", "schedule.milestones=[8,12]"],
    ),
)  # fmt: skip
def test_milestones_that_would_not_be_met_are_refused(settings):
    with pytest.raises(ConfigError, match="schedule.milestones"):
        load(DETECTION, ["schedule.epochs=12", "schedule.warmup_updates=500", *settings])


@pytest.mark.parametrize(
    ("setting", "words"),
    (
        ("geometry.crop=[64]", r"geometry.crop: write one number of pixels, or \[height, width\] \(found \[64\]\)$"),
        ("geometry.crop=a", "^[^\n]*geometry.crop: write one number [^\n]*$"),
        ("geometry.crop=[64,0]", "at least 32 pixels"),
        ("augment.cutmix=1.0", "takes augment.cutmix=0 [(]extend"),
    ),
)  # fmt: skip
def test_what_is_wrong_is_said_once_and_as_it_was_set(setting, words):
    with pytest.raises(ConfigError, match=words):
        load(SEGMENTATION, [setting])


def test_a_schedule_in_updates():
    config = load(
        SEGMENTATION, ["schedule.updates=100", "schedule.warmup_updates=7", "eval.every_steps=20"]
    ).config
    found = derive(config, world=1, samples_per_epoch=4096)
    assert (found.total_steps, found.warmup_steps, found.eval_steps) == (100, 7, 20)
    assert config.schedule.length == "100 updates"
    step = [
        "schedule.kind=step",
        "schedule.milestones=[8,11]",
        "schedule.epochs=12",
        "schedule.warmup_updates=500",
        "train.global_batch=16",
    ]
    found = derive(load(DETECTION, step).config, world=1, samples_per_epoch=4096)
    assert (found.total_steps, found.warmup_steps, found.milestones) == (12 * 256, 500, (8 * 256, 11 * 256))
    with pytest.raises(ConfigError, match="longer"):
        load(SEGMENTATION, ["schedule.updates=5", "schedule.warmup_updates=7"])
