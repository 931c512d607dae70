import subprocess
import sys
from ast import literal_eval
from math import ceil, prod
from pathlib import Path

import pytest

from dattrain.config.derive import derive
from dattrain.config.load import loads
from dattrain.engine.zero import ds_config
from dattrain.errors import ConfigError

BASE = "train: {global_batch: 64, micro_batch: 8}\n"


def settings(*overrides, world=2, device="cuda"):
    config = loads(BASE, overrides).config
    return ds_config(config, derive(config, world=world, samples_per_epoch=640), device=device)


def test_the_batch_is_split_and_clipping_is_always_stated():
    made = settings()
    assert made["train_batch_size"] == 64
    assert made["train_micro_batch_size_per_gpu"] == 8
    assert made["gradient_accumulation_steps"] == 4
    assert made["gradient_clipping"] == 5.0
    assert settings("optim.clip=0")["gradient_clipping"] == 0.0


@pytest.mark.parametrize("stage", range(4))
def test_stages(stage):
    block = settings(f"zero.stage={stage}")["zero_optimization"]
    assert block["stage"] == stage
    assert ("reduce_bucket_size" in block) == (stage > 0)
    assert ("stage3_prefetch_bucket_size" in block) == (stage == 3)


@pytest.mark.parametrize("name, buckets", [("dat_tiny", 6), ("dat_base", 18)])
def test_gradients_travel_in_several_buckets_and_no_matrix_alone(name, buckets):
    lines = (Path(__file__).parents[2] / f"assets/models/keys_{name}.txt").read_text().splitlines()
    shapes = [literal_eval(line.split("\t")[1]) for line in lines]
    sizes = [prod(shape) for shape, line in zip(shapes, lines) if "index" not in line]
    size = settings()["zero_optimization"]["reduce_bucket_size"]
    assert ceil(sum(sizes) / size) == buckets
    assert max(sizes) <= size


def test_precisions():
    assert "torch_autocast" not in settings("train.precision=fp32")
    autocast = settings("train.precision=bf16")
    assert autocast["torch_autocast"] == {
        "enabled": True,
        "dtype": "bfloat16",
        "lower_precision_safe_modules": [],
    }
    assert "bf16" not in autocast
    pure = settings("train.precision=bf16-pure")
    assert pure["bf16"]["enabled"] and pure["data_types"] == {"grad_accum_dtype": "fp32"}
    assert settings("train.precision=fp16")["fp16"]["loss_scale"] == 0  # dynamic


def test_offload_and_extra_pass_through():
    made = settings(
        "zero.stage=3",
        "zero.offload={optimizer: {device: cpu}, param: {device: cpu}}",
        "zero.extra={sub_group_size: 1000, overlap_comm: false}",
    )["zero_optimization"]
    assert made["offload_optimizer"] == {"device": "cpu"} and made["offload_param"] == {"device": "cpu"}
    assert made["sub_group_size"] == 1000 and made["overlap_comm"] is False


@pytest.mark.parametrize(
    "extra, message",
    [
        ("{stage: 3}", r"zero\.extra\.stage: use zero\.stage"),
        ("{offload_optimizer: {}}", r"use zero\.offload\.optimizer"),
        ("{zero_quantized_weights: true}", "refused"),
    ],
)
def test_extra_cannot_contradict_a_setting(extra, message):
    with pytest.raises(ConfigError, match=message):
        settings(f"zero.extra={extra}")


@pytest.mark.parametrize("precision", ["bf16-pure", "fp16"])
def test_what_stage_0_does_wrong_is_refused_when_the_recipe_is_read(precision):
    with pytest.raises(ConfigError, match=rf"zero\.stage=0 with train\.precision={precision}"):
        loads(BASE, ["zero.stage=0", f"train.precision={precision}"])


def test_deepspeed_comes_without_torch_inductor():
    """Of every optimizer it asks whether it is Muon, whose module compiles functions while it is imported: over a second."""
    code = (
        "import sys, torch; from dattrain.engine import zero; zero.import_deepspeed(torch.device('cpu'));"
        "from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam;"
        "print([m for m in ('torch._inductor.compile_fx', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
