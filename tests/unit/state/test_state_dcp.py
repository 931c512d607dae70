"""Checkpoints of torch.distributed.checkpoint out and in, with torch itself on the other side: equal to the bit."""

from __future__ import annotations

import copy
import os
import pickle
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from state_fakes import make
from torch import nn
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from dattrain.cli.main import main
from dattrain.config.load import dump
from dattrain.config.schema import Config
from dattrain.config.sections import Model, Optim
from dattrain.engine import optim
from dattrain.errors import UserError
from dattrain.models import zoo
from dattrain.state import gather
from dattrain.state.convert import dcp_read, dcp_store, dcp_write, offline
from dattrain.state.convert.dcp_store import Chunk
from dattrain.state.format import checkpoint
from dattrain.state.format.manifest import Manifest, Parameter
from dattrain.state.format.rank_file import Piece

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
MODEL = {"name": "dat_atto", "img_size": 64, "num_classes": 7}


def network(seed=0):
    torch.manual_seed(seed)
    return zoo.create("dat_atto", num_classes=7, img_size=64)


def adamw(net, kind=torch.optim.AdamW, **settings):
    """An optimizer of the recipe's two groups."""
    return kind(optim.param_groups(net, 0.05), lr=1e-3, **settings)


def update(net, optimizer, seed):
    g = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.grad = torch.randn(p.shape, generator=g) if p.requires_grad else None
    optimizer.step()


def trained(kind=torch.optim.AdamW):
    """A network and its optimizer after two updates."""
    net = network()
    optimizer = adamw(net, kind)
    for step in range(2):
        update(net, optimizer, step)
    return net, optimizer


def recipe(run, **settings):
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text(dump(Config(name="tiny", model=Model(**MODEL), **settings)))
    return run


def save(run, net, optimizer, **settings):
    """Our checkpoint of it, with averages, in a run folder."""
    recipe(run, **settings)
    named = dict(net.named_parameters())
    states = {"param": named, "ema": {n: p * 0.5 for n, p in named.items()}}
    for moment in ("exp_avg", "exp_avg_sq"):
        states[moment] = {n: optimizer.state[p][moment] for n, p in named.items() if p in optimizer.state}
    pieces = {
        Piece(s, n, 0, t.numel()): t.detach()
        for s, tensors in states.items()
        for n, t in tensors.items()
        if s != "ema" or named[n] in optimizer.state
    }
    manifest = Manifest(
        step=2,
        samples_seen=64,
        world=1,
        stage=2,
        precision="fp16",
        states=("param", "exp_avg", "exp_avg_sq", "ema"),
        parameters={
            n: Parameter(tuple(p.shape), *((True, 2) if p in optimizer.state else (False, None)))
            for n, p in named.items()
        },
        engine={"global_steps": 2, "skipped_steps": 1, "loss_scaler": {"cur_scale": 64.0}},
        groups=[
            {k: list(v) if isinstance(v, tuple) else v for k, v in g.items() if k != "params"}
            for g in optimizer.param_groups
        ],
        meta={"step": 2, "samples_seen": 64, "img_size": 64, "metrics": {"top1": 5.0}, "epoch": 1},
    )
    return offline.write_checkpoint(run / "checkpoints", manifest, [lambda: pieces])


def everything(folder):
    manifest = checkpoint.verify(folder)
    found = {(s, n): t for s in manifest.states for n, t in gather.iter_tensors(folder, s)}
    return found | {("buffer", n): t for n, t in gather.load_buffers(folder).items()}


def same(a, b):
    assert a.keys() == b.keys()
    assert not [k for k in a if not torch.equal(a[k], b[k])]


def held(net, optimizer):
    """Weights and Adam's state by name."""
    found = {("param", n): p.detach() for n, p in net.named_parameters()}
    for name, p in net.named_parameters():
        found |= {(k, name): v for k, v in optimizer.state[p].items()}
    return found


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A run of ours, the folder that it was exported to, and the network and optimizer that it holds."""
    tmp = tmp_path_factory.mktemp("exported")
    net, optimizer = trained(optim.AdamW)
    save(tmp / "run", net, optimizer)
    assert main(["ckpt", "export", str(tmp / "run"), str(tmp / "OUT"), "--to", "dcp"]) == 0
    return tmp / "run", tmp / "OUT", net, optimizer


# Out


def test_torch_loads_what_is_exported_and_goes_on_alike(exported, monkeypatch):
    """By the lines that the documentation shows."""
    _, out, net, optimizer = exported
    page = (Path(__file__).parents[3] / "docs" / "checkpoints.md").read_text()
    section = page[page.index("## From and to FSDP") :]
    other = network(seed=1)
    adam = adamw(other)
    monkeypatch.chdir(out.parent)
    exec(re.findall(r"```python\n(.*?)```", section, re.DOTALL)[0], {"model": other, "optimizer": adam})
    same(held(other, adam), held(net, optimizer))
    mine = copy.deepcopy(net)
    ours = adamw(mine, optim.AdamW)
    ours.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for n, o in ((mine, ours), (other, adam)):
        update(n, o, seed=9)
    same(held(other, adam), held(mine, ours))


@pytest.mark.parametrize("torchtitan", [False, True])
def test_flattened_states_are_there_too(exported, torchtitan):
    """And as torchtitan has them: its model lies at the top, and a schedule has left initial_lr in the groups."""
    _, out, net, optimizer = exported
    other = network(seed=1)
    adam = adamw(other)
    if torchtitan:
        torch.optim.lr_scheduler.LambdaLR(adam, lambda _: 1.0)
    model, states = get_state_dict(other, adam, options=FLAT)
    wanted = {"optimizer": states, **(model if torchtitan else {"model": model})}
    dcp.load(wanted, checkpoint_id=out)
    set_state_dict(other, adam, model_state_dict=model, optim_state_dict=wanted["optimizer"], options=FLAT)
    same(held(other, adam), held(net, optimizer))
    for theirs, ours in zip(adam.param_groups, optimizer.param_groups):
        assert {k: theirs[k] for k in ("lr", "betas", "eps", "weight_decay")}.items() <= ours.items()


def test_averages_and_the_position_are_in_it(exported):
    _, out, net, _ = exported
    wanted = {
        "ema": {n: torch.zeros_like(t) for n, t in net.state_dict().items()},
        "train_state": {
            "step": torch.zeros((), dtype=torch.int32),
            "samples_seen": torch.zeros((), dtype=torch.int64),
        },
    }
    dcp.load(wanted, checkpoint_id=out)
    assert all(torch.equal(t, 0.5 * net.state_dict()[n]) for n, t in wanted["ema"].items())
    assert (wanted["train_state"]["step"], wanted["train_state"]["samples_seen"]) == (2, 64)


def test_rates_by_layer_are_groups_of_their_own(tmp_path):
    """With optim.layer_decay the next update of torch's AdamW is that of ours, whose factors lie in no group."""
    net, optimizer = trained(optim.AdamW)
    save(tmp_path / "run", net, optimizer, optim=Optim(layer_decay=0.5))
    assert main(["ckpt", "export", str(tmp_path / "run"), str(tmp_path / "out"), "--to", "dcp"]) == 0
    other = network(seed=1)
    adam = torch.optim.AdamW([{"params": [p]} for p in other.parameters()])
    model, states = get_state_dict(other, adam, options=FLAT)
    wanted = {"model": model, "optimizer": states}
    dcp.load(wanted, checkpoint_id=tmp_path / "out")
    set_state_dict(other, adam, model_state_dict=model, optim_state_dict=wanted["optimizer"], options=FLAT)
    scales = optim.layer_scales(net, 0.5)
    assert len(set(scales.values())) > 3
    optimizer.set_scales({p: [optim.Run(0, p.numel(), scales[n])] for n, p in net.named_parameters()})
    for n, o in ((net, optimizer), (other, adam)):
        update(n, o, seed=9)
    same(held(other, adam), held(net, optimizer))


def test_an_export_is_whole_or_not_there(exported, tmp_path, capsys, monkeypatch):
    run, out, *_ = exported
    assert main(["ckpt", "export", str(run), str(out), "--to", "dcp"]) == 1
    assert "is there already" in capsys.readouterr().err
    assert main(["ckpt", "export", str(run), str(tmp_path / "x"), "--to", "dcp", "--ema"]) == 2

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dcp_write, "_sync", full)
    assert main(["ckpt", "export", str(run), str(tmp_path / "x"), "--to", "dcp"]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# In


def small():
    """A network that is read as quickly as it is written."""
    torch.manual_seed(0)
    layers = {"stem": nn.Linear(3, 4), "blocks": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))}
    return nn.ModuleDict({**layers, "head": nn.Linear(4, 2)})


def read_in(place, net, root):
    """What ``ckpt import`` does, without the recipe around it; the source and the checkpoint's folder."""
    source = dcp_read.read(place, [n for n, _ in net.named_parameters()])
    manifest = Manifest(
        source.step, 0, 0, 0, "", source.states, source.parameters, source.buffers, groups=source.groups
    )
    return source, offline.write_checkpoint(root, manifest, source.parts)


def _nested(net, optimizer):
    model, states = get_state_dict(net, optimizer)
    return {"model": model, "optimizer": states}


def _torchtitan(net, optimizer):
    model, states = get_state_dict(net, optimizer, options=FLAT)
    return {
        **model,
        "optimizer": states,
        "lr_scheduler": {"last_epoch": 2},
        "dataloader": {"rank_0": pickle.dumps([1])},
        "train_state": {"step": torch.tensor(2, dtype=torch.int32), "ntokens_seen": torch.tensor(9)},
    }


def _tutorial(net, optimizer):
    """As torch's tutorial on DCP has it."""
    model, states = get_state_dict(net, optimizer)
    return {"app": {"model": model, "optim": states}}


def _wrapped(net, optimizer):
    """A compiled, activation-checkpointed DDP model, saved without get_state_dict; states by name."""
    names = {n: f"module._orig_mod._checkpoint_wrapped_module.{n}" for n in net.state_dict()}
    _, states = get_state_dict(net, optimizer)
    return {
        "model": {names[n]: t for n, t in net.state_dict().items()},
        "optimizer": {"state": {f"_orig_mod.{n}": s for n, s in states["state"].items()}},
    }


def _numbered(net, optimizer):
    return {"model": net.state_dict(), "optimizer": optimizer.state_dict()}


FORMS = [_nested, _torchtitan, _tutorial, _wrapped, _numbered]


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.__name__.strip("_"))
def test_what_torch_saved_is_read(tmp_path, form):
    net = small()
    optimizer = adamw(net)
    for step in range(2):
        update(net, optimizer, step)
    dcp.save(form(net, optimizer), checkpoint_id=tmp_path / "saved" / "step-2")
    (tmp_path / "saved" / "step-10").mkdir()  # torchtitan's latest that is whole is taken
    source, folder = read_in(tmp_path / "saved", net, tmp_path / "checkpoints")
    same(everything(folder), {k: t for k, t in held(net, optimizer).items() if k[0] != "step"})
    assert source.step == 2 and source.samples is None
    assert {p.opt_step for p in source.parameters.values()} == {2}
    assert list(source.parameters) == [n for n, _ in net.named_parameters()]
    if form is not _wrapped:  # it has no groups
        assert [g["weight_decay"] for g in source.groups] == [0.05, 0.0]
    assert source.notes == (["left out dataloader, lr_scheduler"] if form is _torchtitan else [])


@pytest.mark.parametrize("writer", ["hf", "plain"])
def test_weights_alone_begin_anew(tmp_path, writer):
    """In bf16, also by the writer of safetensors: fp32 of the same values, moments zero, no update counted."""
    net = small()
    state = {n: t.bfloat16() for n, t in net.state_dict().items()}
    place = tmp_path / "saved"
    if writer == "hf":
        dcp.save(state, storage_writer=dcp.HuggingFaceStorageWriter(str(place), save_distributed=True))
    else:
        dcp.save(state, checkpoint_id=place)
    source, folder = read_in(place, net, tmp_path / "checkpoints")
    assert source.notes == ["it holds no optimizer state: moments begin at zero"]
    assert source.step == 0 and all(p.trainable and p.opt_step == 0 for p in source.parameters.values())
    for (what, name), t in everything(folder).items():
        assert torch.equal(t, state[name].float() if what == "param" else torch.zeros_like(t))


@pytest.mark.parametrize("options", [None, FLAT])
def test_frozen_and_never_stepped_are_told_apart(tmp_path, options):
    """Without state and in no group: frozen. In a group, without a gradient so far: trained, no update counted."""
    net = small()
    named = list(net.named_parameters())
    named[0][1].requires_grad_(False)
    optimizer = adamw(net)
    update(net, optimizer, 0)
    del optimizer.state[named[1][1]]
    model, states = get_state_dict(net, optimizer, options=options)
    dcp.save({"model": model, "optimizer": states}, checkpoint_id=tmp_path)
    got = dcp_read.read(tmp_path, [n for n, _ in named])
    flags = [(p.trainable, p.opt_step) for p in got.parameters.values()]
    assert flags == [(False, None), (True, 0)] + [(True, 1)] * (len(named) - 2)


def test_there_and_back_is_exact(exported, tmp_path, capsys):
    run, out, *_ = exported
    back = recipe(tmp_path / "back")
    assert main(["ckpt", "import", str(out), str(back)]) == 0
    name = "checkpoints/step_00000002"
    before, after = checkpoint.check(run / name), checkpoint.check(back / name)
    for what in ("step", "samples_seen", "stage", "states", "parameters", "buffers", "engine"):
        assert getattr(before, what) == getattr(after, what)
    assert after.meta.items() >= before.meta.items()
    same(everything(run / name), everything(back / name))
    assert main(["ckpt", "import", str(out), str(back)]) == 1
    assert "already holds a checkpoint of step 2" in capsys.readouterr().err


def test_buffers_scalars_and_frozen_parameters_come_back(tmp_path, monkeypatch):
    """A checkpoint of three uneven ranks, with buffers of other dtypes; read in portions of one parameter."""
    frozen = {"stem.bias": Parameter((40,), False, None)}
    folder = make(tmp_path / "run" / "checkpoints", 4, world=3)
    parameters = {**checkpoint.check(folder).parameters, **frozen}
    folder = make(tmp_path / "run2" / "checkpoints", 4, world=3, parameters=parameters)
    names = [n for n, p in parameters.items() if p.trainable]
    dcp_write.write(folder, tmp_path / "out", [{"params": names, "lr": 0.1}])
    monkeypatch.setattr(dcp_read, "PART", 1)
    source = dcp_read.read(tmp_path / "out", list(parameters), ["calls", "mask"])
    assert source.parameters == parameters and len(source.parts) == 4 and source.step == 4
    manifest = Manifest(
        4, 40, 0, 0, "", source.states, source.parameters, source.buffers, engine=source.engine
    )
    same(everything(offline.write_checkpoint(tmp_path / "back", manifest, source.parts)), everything(folder))


# Files that are not as they should be


class Bomb:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return (os.mkdir, (str(self.canary),))


@pytest.fixture
def copied(exported, tmp_path):
    """A copy of the export, and a run to import it into."""
    shutil.copytree(exported[1], tmp_path / "out")
    return tmp_path / "out", recipe(tmp_path / "run")


def refused(out, run, capsys, words, *options):
    assert main(["ckpt", "import", str(out), str(run), *options]) == 1
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error
    assert not list((run / "checkpoints").glob("*")) if (run / "checkpoints").exists() else True
    return error


def test_hostile_pickles_run_only_with_trust(copied, tmp_path, capsys):
    out, run = copied
    canary = tmp_path / "canary"
    listed = pickle.loads((out / ".metadata").read_bytes())
    listed.planner_data["note"] = Bomb(canary)
    for data in (pickle.dumps(listed), pickle.dumps(Bomb(canary)), b"cos\nmkdir\n(S'x'\ntR."):
        (out / ".metadata").write_bytes(data)
        unread(out, ".metadata: cannot be read without running code.*--trust")
    assert not canary.exists()
    # A tensor's place in the data file that is a pickle of another kind.
    info = next(i for k, i in listed.storage_data.items() if k.fqn == "optimizer.param_groups.0.lr")
    place = next(i for k, i in listed.storage_data.items() if k.fqn == "model.patch_embed.proj.bias")
    del listed.planner_data["note"]
    (out / ".metadata").write_bytes(pickle.dumps(listed))
    hidden = pickle.dumps(Bomb(canary))
    for at in (info, place):
        whole = (out / "__0_0.distcp").read_bytes()
        (out / "__0_0.distcp").write_bytes(
            whole[: at.offset] + hidden.ljust(at.length, b"\0") + whole[at.offset + at.length :]
        )
        refused(out, run, capsys, "cannot be read")
        (out / "__0_0.distcp").write_bytes(whole)
    assert not canary.exists()
    listed.planner_data["note"] = Bomb(canary)
    (out / ".metadata").write_bytes(pickle.dumps(listed))
    assert main(["ckpt", "import", str(out), str(run), "--trust"]) == 0 and canary.exists()


def unread(folder, words):
    with pytest.raises(UserError, match=words):
        dcp_store.open_store(folder)


def test_what_is_missing_or_cut_short_is_named(copied, capsys):
    out, run = copied
    data, listed = out / "__0_0.distcp", out / ".metadata"
    size, metadata = data.stat().st_size, listed.read_bytes()
    os.truncate(data, size - 100)
    refused(out, run, capsys, f"is incomplete: __0_0.distcp has {size - 100} bytes of at least {size}")
    data.unlink()
    unread(out, "is incomplete: __0_0.distcp is missing")
    os.mkfifo(data)
    unread(out, "is incomplete: __0_0.distcp is missing")
    for cut in range(0, len(metadata), len(metadata) // 20):
        listed.write_bytes(metadata[:cut])
        unread(out, ".metadata: is not as torch writes it")
    listed.write_bytes(pickle.dumps(Metadata({})))
    unread(out, ".metadata: is not as torch writes it")
    listed.unlink()
    os.mkfifo(listed)
    unread(out, ".metadata: is no ordinary file")
    listed.unlink()
    refused(out, run, capsys, "there is no .metadata", "--from", "dcp")
    refused(out, run, capsys, "in '../run': there is no .metadata", "--from", "dcp", "--tag", "../run")


def test_places_outside_and_writers_that_change_bytes(copied):
    out, _ = copied
    listed = pickle.loads((out / ".metadata").read_bytes())
    info = next(i for k, i in listed.storage_data.items() if k.fqn == "model.patch_embed.proj.bias")
    for fields, words in (
        ({"transform_descriptors": ["stream.zstd"]}, "is written through stream.zstd"),
        ({"transform_descriptors": None, "relative_path": "../secret"}, "is not in this folder"),
        ({"relative_path": "/etc/passwd"}, "is not in this folder"),
        ({"relative_path": "a/../../b"}, "is not in this folder"),
        ({"relative_path": "__0_0.distcp", "offset": -1}, "is not as torch writes it"),
    ):
        vars(info).update(fields)
        (out / ".metadata").write_bytes(pickle.dumps(listed))
        unread(out, words)


def test_chunks_must_cover_a_tensor_once(tmp_path):
    def store(*boxes, dtype=torch.float32):
        chunks = [Chunk(at, n, partial(torch.full, n, i, dtype=dtype)) for i, (at, n) in enumerate(boxes)]
        return dcp_store.Store(tmp_path, {"w": ((2, 3), chunks)})

    whole = store(((0, 0), (2, 1)), ((0, 1), (1, 2)), ((1, 1), (1, 2))).tensor("w")
    assert whole.tolist() == [[0, 1, 1], [0, 2, 2]]
    for boxes, words in (
        ([((0, 0), (2, 1)), ((0, 2), (2, 1))], "is not there in full"),
        ([((0, 0), (2, 2)), ((0, 1), (2, 2))], "overlap"),
        ([], "is not there in full"),
    ):
        with pytest.raises(UserError, match=words):
            store(*boxes).tensor("w")


def test_another_model_and_another_optimizer(tmp_path, capsys):
    net, optimizer = trained()
    dcp.save(_nested(net, optimizer), checkpoint_id=tmp_path / "saved")
    run = recipe(tmp_path / "run")
    refused(tmp_path / "saved", run, capsys, "2 updates of train.global_batch=1024 are 2048")
    (run / "config.yaml").write_text(dump(Config(model=Model(**{**MODEL, "num_classes": 8}))))
    refused(tmp_path / "saved", run, capsys, "head", "--samples-seen", "1")
    dcp.save({"model": {"w": torch.zeros(2)}}, checkpoint_id=tmp_path / "other")
    refused(tmp_path / "other", run, capsys, "holds no tensor of this model; its keys are model.w")
    net = small()
    sgd = torch.optim.SGD(net.parameters(), lr=0.0, momentum=0.9)
    update(net, sgd, 0)
    dcp.save(_nested(net, sgd), checkpoint_id=tmp_path / "sgd")
    with pytest.raises(UserError, match="only from Adam's state can training resume"):
        read_in(tmp_path / "sgd", net, tmp_path / "x")


def test_two_models_are_not_chosen_between(tmp_path):
    net = small()
    dcp.save({"student": net.state_dict(), "teacher": net.state_dict()}, checkpoint_id=tmp_path / "two")
    with pytest.raises(UserError, match="holds several models: 'student.', 'teacher.'"):
        dcp_read.read(tmp_path / "two", [n for n, _ in net.named_parameters()])
