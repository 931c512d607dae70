"""The model of an update on many devices: bytes are conserved, hand-computed cases, and what must never get better or worse."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from dattrain.cli import plan_scaling
from dattrain.cli.main import main
from dattrain.config.schema import Config
from dattrain.config.sections import Offload, Zero
from dattrain.errors import ConfigError
from dattrain.models import flops
from dattrain.planning import scaling_table
from dattrain.planning.network import PROTOCOLS, Network, ring_bytes
from dattrain.planning.scaling import Constants, Layer, Layout, Rate, Work, buckets, exposed, update
from dattrain.tasks.create import create_task

LAYERS = tuple(Layer((4_000_000, 200_000), 0.1) for _ in range(10))
WORK = Work(global_batch=4096, layers=LAYERS, flops=16e9, operations=1600)
FAST = Rate(((1.0, 0.001),), "a millisecond an image")
LAYOUT = Layout(world=64, per_node=8, micro_batch=64, stage=1)


def test_rings_send_each_byte_but_ones_own_part() -> None:
    assert ring_bytes(1000, 1, 2) == 0
    for world in (2, 8, 1024):
        each = ring_bytes(1000, world, 2)
        assert each == pytest.approx(2 * (world - 1) / world * 1000)
        # An all-reduce is a reduce-scatter and an all-gather.
        assert each == ring_bytes(1000, world, 1) * 2


def test_a_collective_by_hand() -> None:
    network = Network(nvlink_gb_s=300, net_gb_s=50, net_achieved=0.8)
    assert network.bus_gb_s(8, 8) == 300 and network.bus_gb_s(16, 8) == 300 and network.bus_gb_s(8, 4) == 160
    # 1 GB by a ring of four nodes of four: 15 steps, 3 of them between nodes; Simple: 8.4 + 12 * 3.4 + 3 * 14 us.
    assert network.all_gather(1e9, 16, 4) == pytest.approx(91.2e-6 + 15 / 16 * 1e9 / 160e9)
    assert network.all_reduce(1e9, 16, 4) == pytest.approx(174e-6 + 2 * 15 / 16 * 1e9 / 160e9)
    # Few bytes over many nodes go by the tree, whose steps grow with the logarithm: 7 within a node, 7 between, there and back.
    low = PROTOCOLS[0]
    assert network.all_reduce(64, 1024, 8) == pytest.approx(
        (low.tree_launch_us + 2 * 7 * 0.6 + 2 * 7 * 5.0) * 1e-6, rel=1e-3
    )


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_one_device_sends_nothing_and_more_never_take_longer_over_their_part(stage: int) -> None:
    alone = update(WORK, replace(LAYOUT, world=1, stage=stage), FAST, Constants())
    assert alone.moved == alone.sent == alone.reduction == alone.weights == alone.agreement == 0
    assert alone.seconds == pytest.approx(4.096 + 42e6 * 28 / 2.97e12)
    before = alone
    for world in (2, 8, 64, 512):
        found = update(WORK, replace(LAYOUT, world=world, micro_batch=8, stage=stage), FAST, Constants())
        assert found.compute == pytest.approx(4.096 / world) and found.sent > 0
        assert found.agreement > before.agreement
        assert found.reduction + found.weights <= found.moved
        before = found
    slower = replace(Constants(), net_gb_s=5.0)
    layout = replace(LAYOUT, stage=stage)
    assert update(WORK, layout, FAST, slower).seconds > update(WORK, layout, FAST, Constants()).seconds
    with pytest.raises(ConfigError, match="no multiple of 3 devices x 64"):
        update(WORK, replace(LAYOUT, world=3), FAST, Constants())


def test_bytes_are_those_that_deepspeed_moves_in_each_stage() -> None:
    """Whole buckets are all-reduced in stages 1 and 2, in the latter once a micro-batch; stage 3 gathers and scatters."""
    size, accumulated = 42e6 * 4, replace(LAYOUT, micro_batch=16)
    sent = {
        stage: update(WORK, replace(accumulated, stage=stage), FAST, Constants()).sent / (size * 63 / 64)
        for stage in (0, 1, 2, 3)
    }
    assert sent == pytest.approx({0: 2, 1: 3, 2: 9, 3: 8})


def test_buckets_fill_from_the_last_layer_and_large_weights_go_alone() -> None:
    layers = [Layer((3,), 0.5), Layer((2, 2), 0.2), Layer((), 0.1), Layer((9, 1), 0.2)]
    found = list(buckets(layers, 5))
    assert [elements for elements, _ in found] == [1, 9, 4, 3]
    assert [share for _, share in found] == pytest.approx([0.2, 0.3, 0.5, 0.0])


def test_what_backward_does_not_hide_is_exposed() -> None:
    half = [(1, 0.5), (1, 0.5)]
    # Hidden but for the last.
    assert exposed(half, 10.0, lambda _: 2.0, waits=True) == pytest.approx(2)
    # The second bucket waits for the first: 5 + 8 + 8 - 10.
    assert exposed(half, 10.0, lambda _: 8.0, waits=True) == pytest.approx(11)
    assert exposed(half, 10.0, lambda _: 0.0, waits=True) == 0


def test_a_rate_is_measured_between_its_points_and_proportional_beyond() -> None:
    rate = Rate.measured([(128, 1000), (32, 400)])
    assert rate.seconds(32) == pytest.approx(0.08) and rate.seconds(4) == pytest.approx(0.08)
    assert rate.seconds(80) == pytest.approx((0.08 + 0.128) / 2)
    assert rate.seconds(256) == pytest.approx(0.256)
    rate = Rate.assumed(WORK, Constants(), compile="none", cuda_graphs=False)
    image = Constants().device_ms_per_gflop * 16e-3
    assert rate.seconds(1000) == pytest.approx(1000 * image)
    assert rate.seconds(1) == pytest.approx(1600 * Constants().eager_us_per_operation * 1e-6)


def test_operations_are_those_that_write() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2, bias=False))
    # A layer more is three products more: forward, and backward's for its input and its weight. Views are none.
    deeper = nn.Sequential(nn.Flatten(), nn.Linear(12, 12, bias=False), nn.Linear(12, 2, bias=False))
    counts = [scaling_table.operations(net, (2, 2)) for net in (model, deeper)]
    assert counts[1] - counts[0] == 3
    assert next(model.parameters()).device == torch.device("cpu")


def test_a_recipe_on_several_numbers_of_devices() -> None:
    """What a large micro-batch saves where launching takes the time, and where a device has too few images."""
    config = Config.model_validate(
        {
            "model": {"name": "dat_atto", "img_size": 32, "num_classes": 10},
            "train": {"global_batch": 64, "micro_batch": 4},
        }
    )
    found = scaling_table.table(
        config, [64, 2], per_node=2, constants=Constants(), fits=16, image_bytes=1000.0, steps=3600
    )
    two, most = found["rows"]
    assert (two["world"], two["micro_batch"], two["accumulation"], most["world"], most["nodes"]) == (
        2,
        4,
        8,
        64,
        32,
    )
    # Launching takes all of the time: four times the images in the same; and one image a device gains nothing over 16 devices.
    assert two["better"]["micro_batch"] == {"value": 16, "saves": pytest.approx(0.75, abs=0.01)}
    assert found["too_small_from"] == 2 and most["compute_s"] == pytest.approx(two["compute_s"] / 8)
    assert (
        two["hours"] == pytest.approx(two["seconds"])
        and two["node_bytes_per_s"] == two["node_images_per_s"] * 1000
    )
    assert found["gradient_bytes"] == 4 * flops.parameters(create_task(config).build(32))
    shown = plan_scaling.render(found, replace(Constants(), net_gb_s=25))
    assert "train.micro_batch=16 (-75%)" in shown and "net_gb_s=25: given" in shown
    assert "slower" not in shown
    found["rate_points"] = Rate.measured([(32, 900), (64, 700), (128, 950)]).points
    assert "64 images at a time are slower (700 images/s) than 32 (900)" in plan_scaling.render(
        found, Constants()
    )
    config = config.model_copy(update={"zero": Zero(stage=2, offload=Offload(optimizer={"device": "cpu"}))})
    with pytest.raises(ConfigError, match=r"zero\.offload"):
        scaling_table.table(config, [2], per_node=2, constants=Constants(), fits=16)


def test_what_the_command_line_says_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan_scaling.numbers("8,16") == [8, 16]
    assert plan_scaling.rates("32:610,128:1050.5") == [(32, 610), (128, 1050.5)]
    assert plan_scaling.constants(["net_gb_s=25"]).net_gb_s == 25
    for wrong, call in (
        ("--scaling 8,x", lambda: plan_scaling.numbers("8,x")),
        ("--device-rates 32", lambda: plan_scaling.rates("32")),
        ("--device-rates 8:1,8:2", lambda: plan_scaling.rates("8:1,8:2")),
        ("--device-rates 32:nan", lambda: plan_scaling.rates("32:nan")),
        ("--device-rates 32:inf", lambda: plan_scaling.rates("32:inf")),
        ("--device-rates 32:1e308", lambda: plan_scaling.rates("32:1e308")),
        (f"--device-rates {10**400}:1", lambda: plan_scaling.rates(f"{10**400}:1")),
        (
            "--assume agreements=1e308.* from 0.004 to 4,000",
            lambda: plan_scaling.constants(["agreements=1e308"]),
        ),
        ("--assume net_achieved=1e-310", lambda: plan_scaling.constants(["net_achieved=1e-310"])),
        ("--assume net_achieved=2.* to 1$", lambda: plan_scaling.constants(["net_achieved=2"])),
        ("--assume net=3", lambda: plan_scaling.constants(["net=3"])),
        ("--assume net_gb_s=-1", lambda: plan_scaling.constants(["net_gb_s=-1"])),
    ):
        with pytest.raises(ConfigError, match=wrong):
            call()
    # Before the recipe is looked at, whose own refusal would hide it.
    for given, why in (
        (["--scaling", "8", "--assume", "net=3"], "net=3"),
        (["--assume", "agreements=3"], "--scaling"),
    ):
        assert main(["plan", "no_such_recipe", *given]) == 2
        assert why in capsys.readouterr().err


def test_a_rate_that_was_not_given_is_not_called_so() -> None:
    given = {"rate": "given", "rate_points": [(32.0, 0.05), (128.0, 0.12)], "single_micro_batch": 32}
    assert plan_scaling._source(given) == "given"
    assert plan_scaling._source({**given, "single_micro_batch": 8}) == "not given: by those at 32, 128"
