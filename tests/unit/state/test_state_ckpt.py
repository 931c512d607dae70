"""``dattrain ckpt``: the verb, as a user runs it, on checkpoints made without an engine."""

from __future__ import annotations

import errno
import json
import os

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from state_fakes import make

import dattrain.models  # noqa: F401  (registers with timm)
from dattrain.cli.main import main
from dattrain.config.load import dump
from dattrain.config.schema import Config
from dattrain.config.sections import Checkpoint, Model
from dattrain.models import zoo
from dattrain.runtime import owner
from dattrain.state.convert import offline
from dattrain.state.format import checkpoint
from dattrain.state.format.manifest import Manifest, Parameter
from dattrain.state.format.rank_file import Piece


@pytest.fixture
def run_dir(tmp_path):
    """A run folder with four checkpoints, the third one cut short, and a recipe that keeps one and the best."""
    run = tmp_path / "run"
    for step, top1 in ((1, 60.0), (2, 70.0), (3, 65.0), (4, 66.0)):
        make(
            run / "checkpoints",
            step,
            meta={"step": step, "samples_seen": step * 10, "epoch": step / 2, "metrics": {"top1": top1}},
        )
    path = run / "checkpoints" / "step_00000003" / "rank_00001.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    (run / "config.yaml").write_text(dump(Config(checkpoint=Checkpoint(keep_last=1, keep_best=1))))
    return run


def test_ls(run_dir, capsys):
    assert main(["ckpt", "ls", str(run_dir)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:4] == ["step", "samples", "epoch", "top1"]
    assert lines[2].split()[:4] == ["2", "20", "1", "70"] and lines[2].endswith("best top1  complete")
    assert "damaged: rank_00001.safetensors: 100 bytes, not" in lines[3]
    assert lines[4].split()[-2:] == ["last", "complete"]
    assert main(["ckpt", "ls", str(run_dir), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [r["step"] for r in rows] == [1, 2, 3, 4] and rows[0]["world"] == 2 and rows[2]["metric"] is None


def test_inspect(run_dir, capsys):
    assert main(["ckpt", "inspect", str(run_dir), "--json", "--tensors"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["step"] == 4 and facts["meta"]["metrics"] == {"top1": 66.0}
    assert facts["tensors"]["stem.weight"] == {"shape": [40, 3, 7, 7], "trainable": True, "opt_step": 4}
    assert main(["ckpt", "inspect", str(run_dir / "checkpoints" / "step_00000002")]) == 0
    assert "samples_seen: 20" in capsys.readouterr().out
    assert main(["ckpt", "inspect", str(run_dir / "checkpoints" / "step_00000003")]) == 1
    assert "is not a complete checkpoint: rank_00001.safetensors" in capsys.readouterr().err


def test_verify(run_dir, capsys):
    path = run_dir / "checkpoints" / "step_00000001" / "rank_00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert main(["ckpt", "verify", str(run_dir)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "step_00000001: DAMAGED: rank_00000.safetensors: bytes" in lines[0]
    assert "step_00000002: complete, 2 files" in lines[1]
    assert "step_00000003: DAMAGED" in lines[2]
    assert main(["ckpt", "verify", str(run_dir / "checkpoints" / "step_00000004")]) == 0
    assert main(["ckpt", "verify", str(run_dir / "nothing")]) == 1


def test_prune_makes_room_on_a_full_disk(run_dir, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with owner.acquire(run_dir):
        monkeypatch.setattr("dattrain.runtime.claims._write", full)
        assert main(["ckpt", "prune", str(run_dir)]) == 1
    assert main(["ckpt", "prune", str(run_dir)]) == 0
    assert "removed step_00000001" in capsys.readouterr().out


def test_prune_removes_none_for_the_sake_of_one_that_is_not_complete(run_dir, capsys):
    path = run_dir / "checkpoints" / "step_00000004" / "rank_00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert main(["ckpt", "prune", str(run_dir)]) == 0
    assert [e.step for e in checkpoint.list_all(run_dir / "checkpoints")] == [2, 3, 4]
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "kept step_00000002 (last)" and "(damaged: rank_00000" in lines[3]


def test_prune_pin_and_damaged(run_dir, capsys):
    def left():
        return [e.step for e in checkpoint.list_all(run_dir / "checkpoints")]

    assert main(["ckpt", "prune", str(run_dir), "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "would remove step_00000001" and left() == [1, 2, 3, 4]
    assert main(["ckpt", "pin", str(run_dir / "checkpoints" / "step_00000001")]) == 0
    assert main(["ckpt", "prune", str(run_dir)]) == 0
    assert left() == [1, 2, 3, 4]
    assert main(["ckpt", "pin", str(run_dir / "checkpoints" / "step_00000001"), "--off"]) == 0
    assert main(["ckpt", "prune", str(run_dir)]) == 0
    assert left() == [2, 3, 4]
    assert main(["ckpt", "prune", str(run_dir), "--damaged", "--keep-best", "0"]) == 0
    assert left() == [4]
    assert main(["ckpt", "prune", str(run_dir), "--keep-last", "0"]) == 2
    (run_dir / "checkpoints" / "step_00000004" / "manifest.json").unlink()
    assert main(["ckpt", "prune", str(run_dir), "--damaged"]) == 1
    assert "may be all there is" in capsys.readouterr().err and left() == [4]


def atto(run, *, ema=True, img_size=64, **settings):
    """A run folder with one checkpoint of a real, small network laid out for ``img_size``; returns the network."""
    config = Config(name="tiny", model=Model(name="dat_atto", img_size=64, num_classes=7), **settings)
    torch.manual_seed(0)
    net = zoo.create("dat_atto", num_classes=7, img_size=img_size)
    weights = {n: p.detach() for n, p in net.named_parameters()}
    states = {"param": weights, "exp_avg": weights, "exp_avg_sq": weights}
    if ema:
        states["ema"] = {n: p * 0.5 for n, p in weights.items()}
    pieces = {Piece(s, n, 0, p.numel()): p for s, named in states.items() for n, p in named.items()}
    pieces.update(
        {
            Piece("buffer", n, 0, b.numel(), "F32", tuple(b.shape)): b
            for n, b in net.state_dict().items()
            if n not in weights
        }
    )
    manifest = Manifest(
        step=5,
        samples_seen=50,
        world=1,
        stage=2,
        precision="bf16",
        states=tuple(states),
        parameters={n: Parameter(tuple(p.shape), True, 5) for n, p in weights.items()},
        buffers=tuple(n for n in net.state_dict() if n not in weights),
        meta={"step": 5, "samples_seen": 50},
    )
    offline.write_checkpoint(run / "checkpoints", manifest, [lambda: pieces])
    (run / "config.yaml").write_text(dump(config))
    return net


@pytest.mark.parametrize("flag, scale", [([], 0.5), (["--no-ema"], 1.0)])
def test_export_is_loaded_by_timm(tmp_path, capsys, flag, scale):
    net = atto(tmp_path / "run")
    out = tmp_path / "out"
    assert main(["ckpt", "export", str(tmp_path / "run"), str(out), *flag]) == 0
    loaded = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    expected = {n: p * scale for n, p in net.named_parameters()}
    got = dict(loaded.named_parameters())
    assert got.keys() == expected.keys() and all(torch.equal(got[n], expected[n]) for n in got)
    assert loaded.num_classes == 7 and loaded(torch.zeros(1, 3, 64, 64)).shape == (1, 7)
    assert load_file(out / "model.safetensors").keys() == net.state_dict().keys()
    with safe_open(out / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["dattrain"])["name"] == "dat_atto"


@pytest.mark.parametrize("flag", ["--ema", "--no-ema"])
@pytest.mark.parametrize("img_size", [64, 96])
def test_both_exports_describe_a_model_alike(tmp_path, img_size, flag):
    """``ckpt export`` and ``export --to timm``: the same config.json, metadata and tensors, also in a later phase of resizing."""
    progressive = {"progressive": [{"epoch": 1, "img_size": 96}]}
    run, one, two = tmp_path / "run", tmp_path / "one", tmp_path / "two"
    atto(run, img_size=img_size, train=progressive, augment={"mean": (0.3, 0.3, 0.3)})
    assert main(["ckpt", "export", str(run), str(one), flag]) == 0
    assert main(["export", str(run), "--to", "timm", "--out", str(two), flag]) == 0
    assert (one / "config.json").read_bytes() == (two / "config.json").read_bytes()
    assert json.loads((one / "config.json").read_text())["model_args"]["img_size"] == [img_size] * 2
    with (
        safe_open(one / "model.safetensors", "pt") as a,
        safe_open(two / "model.safetensors", "pt") as b,
    ):
        assert a.metadata() == b.metadata()
        assert sorted(a.keys()) == sorted(b.keys())
        assert all(torch.equal(a.get_tensor(name), b.get_tensor(name)) for name in a.keys())  # noqa: SIM118


def test_export_refuses_what_is_not_there(tmp_path, capsys):
    atto(tmp_path / "run", ema=False)
    assert main(["ckpt", "export", str(tmp_path / "run"), str(tmp_path / "out"), "--ema"]) == 1
    assert "holds no averaged weights" in capsys.readouterr().err
    assert (
        main(["ckpt", "export", str(tmp_path / "run"), str(tmp_path / "out"), "--to", "deepspeed", "--ema"])
        == 2
    )


def test_stream_file_keeps_its_promise_or_writes_nothing(tmp_path):
    shapes = {"a": ("F32", (2, 3)), "b": ("I64", ())}
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(9)}
    offline.stream_file(tmp_path / "x.safetensors", tensors.items(), shapes, {"k": "v"})
    loaded = load_file(tmp_path / "x.safetensors")
    assert torch.equal(loaded["a"], tensors["a"]) and int(loaded["b"]) == 9
    for wrong in ([("a", tensors["a"])], [("b", tensors["b"])], [*tensors.items(), ("c", tensors["b"])]):
        with pytest.raises(ValueError):
            offline.stream_file(tmp_path / "y.safetensors", wrong, shapes, {})
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_import_refuses_before_it_reads(tmp_path, capsys):
    (tmp_path / "ds").mkdir()
    assert main(["ckpt", "import", str(tmp_path / "ds"), str(tmp_path / "run")]) == 1
    assert "has no config.yaml" in capsys.readouterr().err
    atto(tmp_path / "run")
    assert main(["ckpt", "import", str(tmp_path / "ds"), str(tmp_path / "run")]) == 1
    assert "neither a file 'latest'" in capsys.readouterr().err
    assert main(["ckpt", "import", str(tmp_path / "none"), str(tmp_path / "run")]) == 1


def test_import_of_an_unsharded_deepspeed_checkpoint(tmp_path, capsys):
    """Stage 0, as DeepSpeed writes it: a whole model and a torch optimizer's state by number."""
    net = atto(tmp_path / "run")
    groups = [
        {"params": [p for p in net.parameters() if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in net.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    for _ in range(3):
        net(torch.randn(2, 3, 64, 64)).square().sum().backward()
        optimizer.step()
    tag = tmp_path / "ds" / "global_step3"
    tag.mkdir(parents=True)
    (tmp_path / "ds" / "latest").write_text("global_step3")
    states = {
        "module": net.state_dict(),
        "buffer_names": [n for n, _ in net.named_buffers() if n in net.state_dict()],
        "optimizer": optimizer.state_dict(),
        "dp_world_size": 1,
        "global_steps": 3,
        "global_samples": 6,
        "skipped_steps": 0,
    }
    torch.save(states, tag / "mp_rank_00_model_states.pt")
    assert main(["ckpt", "import", str(tmp_path / "ds"), str(tmp_path / "run")]) == 0
    folder = tmp_path / "run" / "checkpoints" / "step_00000003"
    manifest = checkpoint.verify(folder)
    assert manifest.samples_seen == 6 and manifest.meta["img_size"] == 64
    from dattrain.state import gather

    for state in ("exp_avg", "exp_avg_sq"):
        for name, tensor in gather.iter_tensors(folder, state):
            assert torch.equal(tensor, optimizer.state[net.get_parameter(name)][state])
    assert main(["ckpt", "import", str(tmp_path / "ds"), str(tmp_path / "run")]) == 1
    assert "already holds a checkpoint of step 3" in capsys.readouterr().err
    other = Config(model=Model(name="dat_atto", img_size=64, num_classes=8))
    (tmp_path / "run" / "config.yaml").write_text(dump(other))
    assert main(["ckpt", "import", str(tmp_path / "ds"), str(tmp_path / "run")]) == 1
    assert "head" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["../../evil", "..", "/evil", "a/b"])
def test_parameter_names_cannot_lead_an_export_astray(tmp_path, capsys, name):
    values = torch.ones(3)
    pieces = {Piece(s, name, 0, 3): values for s in ("param", "exp_avg", "exp_avg_sq")}
    manifest = Manifest(1, 1, 1, 2, "", ("param", "exp_avg", "exp_avg_sq"), {name: Parameter((3,), True, 1)})
    offline.write_checkpoint(tmp_path / "run" / "checkpoints", manifest, [lambda: pieces])
    out = tmp_path / "deep" / "out"
    assert main(["ckpt", "export", str(tmp_path / "run"), str(out), "--to", "deepspeed"]) == 1
    assert "cannot be the name of a folder" in capsys.readouterr().err
    assert not out.exists() and sorted(p.name for p in tmp_path.iterdir()) == ["run"]
