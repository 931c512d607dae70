from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from state_fakes import make, values

from dattrain.errors import Damaged, UserError
from dattrain.state import gather
from dattrain.state.format import checkpoint, manifest
from dattrain.state.format.manifest import Manifest, Parameter, read_manifest
from dattrain.state.format.rank_file import BLOCK, Digest


def simple(**fields):
    base = Manifest(
        step=3,
        samples_seen=30,
        world=1,
        stage=0,
        precision="bf16",
        states=("param",),
        parameters={"w": Parameter((2, 3), True, 3), "frozen": Parameter((), False, None)},
        files={"rank_00000.safetensors": Digest(100, 8, "0" * 8)},
        meta={
            "step": 3,
            "samples_seen": 30,
            "metrics": {"top1": 71.5, "loss": float("nan")},
            "ключ": ["é", None, 1e-7],
        },
    )
    return dataclasses.replace(base, **fields)


def test_manifest_round_trip():
    text = simple().render()
    again = Manifest.parse(text)
    assert again.render() == text
    assert again.parameters == simple().parameters and again.files == simple().files
    assert again.metric("top1") == 71.5 and again.metric("loss") is None and again.metric("none") is None
    assert json.loads(text)["manifest"]["samples_seen"] == 30


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(), x, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), JSON, max_size=4))
def test_any_json_survives_in_meta(meta):
    text = simple(meta=meta).render()
    assert Manifest.parse(text).render() == text


def test_no_changed_byte_of_a_manifest_is_believed():
    text = simple().render()
    for at in range(len(text)):
        for bit in (1, 16):
            changed = bytearray(text)
            changed[at] ^= bit
            with pytest.raises(Damaged):
                Manifest.parse(bytes(changed))
    for end in range(len(text)):
        with pytest.raises(Damaged):
            Manifest.parse(text[:end])
    with pytest.raises(Damaged):
        Manifest.parse(text + b" ")


@pytest.mark.parametrize(
    "name",
    [
        "../rank_00000.safetensors",
        "/etc/passwd",
        "a/rank_00000.safetensors",
        "rank_00000.safetensors\n",
        "rank_1.pt",
        "",
    ],
)
def test_a_manifest_cannot_name_a_file_outside_its_folder(name):
    evil = simple(files={name: Digest(100, 8, "0" * 8)}).render()
    with pytest.raises(Damaged, match="no checkpoint has"):
        Manifest.parse(evil)


def test_a_manifest_of_a_later_format_says_so(monkeypatch):
    monkeypatch.setattr(manifest, "FORMAT", 2)
    text = simple().render()
    monkeypatch.undo()
    with pytest.raises(Damaged, match="format 2"):
        Manifest.parse(text)


def test_entries_and_find(tmp_path):
    for step in (1, 2, 30):
        make(tmp_path, step)
    (tmp_path / "step_00000002" / "pinned").touch()
    (tmp_path / "step_x").mkdir()
    (tmp_path / "notes.txt").write_text("")
    found = checkpoint.list_all(tmp_path)
    assert [(e.step, e.pinned) for e in found] == [(1, False), (2, True), (30, False)]
    newest = checkpoint.find(tmp_path)
    assert newest.folder == tmp_path / "step_00000030" and newest.skipped == ()
    assert newest.manifest.samples_seen == 300
    skipped = checkpoint.find(tmp_path, skip={"step_00000030": "bad block"})
    assert skipped.folder.name == "step_00000002" and skipped.skipped == (("step_00000030", "bad block"),)


def test_a_renamed_checkpoint_is_not_taken_for_another_step(tmp_path):
    make(tmp_path, 1).rename(tmp_path / "step_00000009")
    assert "is of step 1" in checkpoint.list_all(tmp_path)[0].reason


def damage(folder: Path):
    """(what, how to do it) for every file of a checkpoint."""
    for path in sorted(folder.iterdir()):
        size = path.stat().st_size
        yield f"{path.name} removed", path, None
        for end in sorted({0, 1, size // 2, size - 1}):
            yield f"{path.name} cut at {end}", path, lambda b, end=end: b[:end]
        for at in sorted({0, 9, size // 3, size // 2, size - 1, *range(0, size, BLOCK)}):
            yield (
                f"{path.name} flipped at {at}",
                path,
                lambda b, at=at: b[:at] + bytes([b[at] ^ 1]) + b[at + 1 :],
            )


def test_every_file_damaged_one_at_a_time_is_noticed_and_the_one_before_is_used(tmp_path):
    make(tmp_path, 1, world=3)
    newest = make(tmp_path, 2, world=3)
    count = 0
    for what, path, how in damage(newest):
        whole = path.read_bytes()
        if how is None:
            path.unlink()
        else:
            path.write_bytes(how(whole))
        found = checkpoint.find(tmp_path, read_all=True)
        assert found.folder is not None and found.folder.name == "step_00000001", what
        assert found.skipped[0][0] == "step_00000002" and path.name in found.skipped[0][1], what
        if "flipped" not in what or path.name == "manifest.json":
            assert checkpoint.find(tmp_path).folder.name == "step_00000001", f"sizes alone tell: {what}"
        path.write_bytes(whole)
        count += 1
    assert count > 30
    assert checkpoint.find(tmp_path, read_all=True).folder == newest


def test_locate(tmp_path):
    run = tmp_path / "run"
    with pytest.raises(UserError, match="holds no checkpoint"):
        checkpoint.locate(run)
    folder = make(run / "checkpoints", 4)
    assert (
        checkpoint.locate(run)
        == checkpoint.locate(run / "checkpoints")
        == checkpoint.locate(folder)
        == folder
    )
    (folder / "rank_00001.safetensors").unlink()
    with pytest.raises(UserError, match="rank_00001.safetensors: missing"):
        checkpoint.locate(folder)
    with pytest.raises(
        UserError, match=r"holds no complete checkpoint: step_00000004 \(rank_00001.*Nothing was changed"
    ):
        checkpoint.locate(run)


class Bomb:
    def __reduce__(self):
        return (os.system, ("touch /tmp/dattrain-was-here",))


def test_a_hostile_pickle_in_any_place_is_never_run(tmp_path):
    canary = Path("/tmp/dattrain-was-here")
    canary.unlink(missing_ok=True)
    good = make(tmp_path, 1)
    bad = make(tmp_path, 2)
    for path in sorted(bad.iterdir()):
        for bomb in (pickle.dumps(Bomb()), _torch_bytes(tmp_path)):
            whole = path.read_bytes()
            path.write_bytes(bomb.ljust(len(whole), b"\0")[: len(whole)] if len(bomb) <= len(whole) else bomb)
            assert checkpoint.find(tmp_path, read_all=True).folder == good
            for read in (
                checkpoint.check,
                checkpoint.verify,
                read_manifest,
                gather.load_tensors,
                gather.load_buffers,
            ):
                with contextlib.suppress(
                    Damaged, UserError
                ):  # a bomb of the right size passes where sizes alone are read
                    read(bad)
            path.write_bytes(whole)
    assert not canary.exists()


def _torch_bytes(tmp_path):
    torch.save({"x": Bomb()}, tmp_path / "bomb.pt")
    data = (tmp_path / "bomb.pt").read_bytes()
    (tmp_path / "bomb.pt").unlink()
    return data


def test_publish_replaces_an_older_one_of_the_same_step_and_keeps_its_pin(tmp_path):
    (make(tmp_path, 5, seed=0) / "pinned").touch()
    folder = make(tmp_path, 5, seed=1)
    assert (folder / "pinned").exists()
    assert torch.equal(gather.load_tensors(folder)["head.weight"], values(1)["param/head.weight"])
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000005"]


@pytest.mark.parametrize("die_at", range(1, 12))
def test_death_at_any_file_operation_of_a_publish_leaves_a_whole_checkpoint(tmp_path, monkeypatch, die_at):
    """The old checkpoint of the step, or the new one, is whole whenever we die; never none, never half."""
    make(tmp_path, 5, seed=0)
    calls = 0

    def dying(real):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == die_at:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        return call

    for module, name in ((os, "rename"), (os, "fsync"), (shutil, "rmtree"), (os, "open")):
        monkeypatch.setattr(module, name, dying(getattr(module, name)))
    with contextlib.suppress(KeyboardInterrupt):
        make(tmp_path, 5, seed=1)
    monkeypatch.undo()
    checkpoint.recover(tmp_path)
    found = checkpoint.find(tmp_path, read_all=True)
    assert found.folder is not None and found.skipped == ()
    got = gather.load_tensors(found.folder)["head.weight"]
    assert any(torch.equal(got, values(s)["param/head.weight"]) for s in (0, 1))
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000005"]


def test_recover_puts_back_what_was_moved_aside_and_clears_the_rest(tmp_path):
    make(tmp_path, 1).rename(tmp_path / ".old-step_00000001")
    make(tmp_path, 2).rename(tmp_path / ".gone-step_00000002")
    (tmp_path / ".new-abc-1-step_00000003").mkdir()
    (tmp_path / "mine").mkdir()
    assert checkpoint.recover(tmp_path) == [".gone-step_00000002", ".new-abc-1-step_00000003"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "step_00000001"]


@pytest.mark.parametrize("world", [1, 3])
def test_gather_gives_whole_tensors(tmp_path, world):
    folder = make(tmp_path, 1, world=world)
    expected = values()
    for state in ("param", "exp_avg", "exp_avg_sq", "ema"):
        got = dict(gather.iter_tensors(folder, state))
        assert list(got) == ["stem.weight", "stem.bias", "head.weight", "head.bias"]
        for name, tensor in got.items():
            assert torch.equal(tensor, expected[f"{state}/{name}"])
    whole = gather.load_tensors(folder, "ema")
    assert (
        whole["calls"].shape == ()
        and int(whole["calls"]) == 1
        and whole["mask"].tolist() == [True, False, True]
    )
    assert [n for n, _ in gather.iter_tensors(folder, names=["head.bias"])] == ["head.bias"]


def test_gather_refuses_by_name(tmp_path):
    folder = make(tmp_path, 1, states=("param",))
    with pytest.raises(UserError, match="holds param, but no ema"):
        gather.load_tensors(folder, "ema")
    data = bytearray((folder / "rank_00001.safetensors").read_bytes())
    data[5000] ^= 1
    (folder / "rank_00001.safetensors").write_bytes(data)
    with pytest.raises(UserError, match="rank_00001.safetensors: bytes 0-"):
        gather.load_tensors(folder)


def test_a_missing_fragment_is_noticed_even_if_all_checksums_fit(tmp_path):
    folder = make(tmp_path, 1, world=3)
    manifest = read_manifest(folder)
    files = {n: d for n, d in manifest.files.items() if n != "rank_00001.safetensors"}
    (folder / "manifest.json").write_bytes(dataclasses.replace(manifest, files=files).render())
    with pytest.raises(UserError, match="do not cover its 5880 elements exactly once"):
        gather.load_tensors(folder)


@pytest.mark.parametrize(
    "call, code, told",
    [
        ("rename", errno.ENOSYS, "renaming the folder .new-a-step_00000003 to step_00000003: ENOSYS: "),
        ("fsync", errno.EIO, "syncing (fsync) manifest.json: EIO: Input/output error"),
    ],
)
def test_a_save_that_fails_says_at_which_operation(tmp_path, monkeypatch, call, code, told):
    folder = checkpoint.temporary_folder(tmp_path, 3, "a")
    folder.mkdir()

    def refused(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, refused)
    with pytest.raises(OSError) as error:
        checkpoint.publish(folder, simple())
    assert str(error.value).startswith(told) and error.value.errno == code
