"""What is chosen for one's own images is a recipe that trains, of every size of set and machine, and follows what is given."""

import itertools

import pytest

from dattrain.cli.own_images import nested
from dattrain.config.choose import GIVEN, Choice, Images, Machine, Weights, choose
from dattrain.config.derive import derive
from dattrain.config.schema import Config

CPU = Machine("cpu", 1, 2)
GPU = Machine("cuda", 1, 16, bf16=True)
TINY = Weights("w.safetensors", "dat_tiny", 224, mean=(0.5, 0.5, 0.5), resize="squash", shared=0)


def values(found: dict[str, Choice]) -> Config:
    return Config.model_validate(nested({key: choice.value for key, choice in found.items()}))


@pytest.mark.parametrize("weights", [None, TINY], ids=["scratch", "tuned"])
@pytest.mark.parametrize(
    "machine", [CPU, Machine("cpu", 2, 2), GPU, Machine("cuda", 3, 16), Machine("cuda", 8, 64, True)], ids=str
)
def test_it_trains_whatever_the_size_of_the_set(machine, weights):
    for n, classes in itertools.product((2, 9, 60, 254, 5_000, 1_281_167), (2, 1000)):
        if n < 2 * machine.devices:
            continue  # fewer than a sample a device
        found = choose(Images(n, max(1, n // 10), classes, 300), machine, weights)
        assert all(choice.reason for choice in found.values())
        config = values(found)
        derived = derive(config, world=machine.devices, samples_per_epoch=n)
        assert derived.total_steps >= 1 and 1e-6 < derived.peak_lr < 5e-3
        assert derived.peak_lr == pytest.approx(config.optim.lr)
        assert derived.warmup_steps <= derived.total_steps
        assert n < 64 or derived.steps_per_epoch >= 8
        assert config.checkpoint.every_epochs == config.eval.every_epochs, "the best one is there to be kept"


def test_a_small_set_on_a_cpu_is_minutes_of_a_small_network_and_a_gpu_gets_the_papers():
    small = values(choose(Images(254, 26, 5, 480), CPU))
    assert (small.model.name, small.train.precision) == ("dat_atto", "fp32")
    assert 10_000 <= small.schedule.epochs * 254 <= 20_200
    large = values(choose(Images(254, 26, 5, 480), GPU))
    assert (large.model.name, large.model.img_size, large.train.precision) == ("dat_tiny", 224, "bf16")
    assert large.train.micro_batch == "auto"
    assert values(choose(Images(254, 26, 5, 28), CPU)).model.img_size == 32
    full = values(choose(Images(1_000_000, 1, 1000, 480), GPU)).augment
    assert full == Config().augment, "many images on a GPU get the authors' augmentation"


def test_a_fine_tune_takes_what_the_weights_were_trained_with():
    tuned = values(choose(Images(254, 26, 5, 480), CPU, TINY))
    assert (tuned.init.from_, tuned.init.head, tuned.model.name) == ("w.safetensors", "new", "dat_tiny")
    assert (tuned.augment.mean, tuned.eval.resize) == ((0.5, 0.5, 0.5), "squash")
    scratch = values(choose(Images(254, 26, 5, 480), CPU, None, {"model.name": "dat_tiny"}))
    assert tuned.optim.lr < scratch.optim.lr and tuned.schedule.epochs < scratch.schedule.epochs
    shared = Weights("w", "dat_tiny", 224, shared=2)
    assert values(choose(Images(254, 26, 5, 480), CPU, shared)).init.head == "map"


def test_what_is_given_stands_and_the_rest_follows():
    given = {"train.global_batch": 64, "schedule.epochs": 40, "model.name": "dat_small"}
    free, found = (choose(Images(254, 26, 5, 480), CPU, None, each) for each in (None, given))
    assert all(found[key] == Choice(value, GIVEN) for key, value in given.items())
    assert found["optim.lr_batch"].value == 64 and found["eval.every_epochs"].value == 4
    assert found["optim.lr"].value == pytest.approx(1e-3 / 4), "dat_small's rate, at a sixteenth of 1,024"
    assert free["optim.lr"] != found["optim.lr"]
