"""To FSDP 2 on two ranks and back by torch.distributed.checkpoint: the update between is that of one process, to the bit."""

import pytest
import torch
from state_fsdp import gradients
from state_ranks import HERE, assert_same, finished, spawn, states

from dattrain.cli.main import main
from dattrain.config.load import dump
from dattrain.config.schema import Config
from dattrain.config.sections import Model
from dattrain.engine.optim import param_groups
from dattrain.models import zoo
from dattrain.state.convert import offline
from dattrain.state.format import checkpoint
from dattrain.state.format.manifest import Manifest, Parameter
from dattrain.state.format.rank_file import Piece

CONFIG = Config(name="tiny", model=Model(name="dat_atto", img_size=64, num_classes=7))


@pytest.mark.full
def test_there_an_update_and_back(tmp_path):
    net = zoo.create("dat_atto", num_classes=7, img_size=64)
    optimizer = torch.optim.AdamW(param_groups(net, 0.05), lr=1e-3)

    def update():
        for (_, p), g in zip(net.named_parameters(), gradients(net).values()):
            p.grad = g
        optimizer.step()

    def held():
        found = {f"param/{n}": p.detach().clone() for n, p in net.named_parameters()}
        moments = ("exp_avg", "exp_avg_sq")
        return found | {
            f"{m}/{n}": optimizer.state[p][m].clone() for m in moments for n, p in net.named_parameters()
        }

    update()
    update()
    for run in ("run", "nested-run", "flat-run"):
        (tmp_path / run).mkdir()
        (tmp_path / run / "config.yaml").write_text(dump(CONFIG))
    pieces = {Piece(*key.split("/"), 0, t.numel()): t for key, t in held().items()}
    manifest = Manifest(
        step=2,
        samples_seen=64,
        world=1,
        stage=0,
        precision="fp32",
        states=("param", "exp_avg", "exp_avg_sq"),
        parameters={n: Parameter(tuple(p.shape), True, 2) for n, p in net.named_parameters()},
        groups=[{"name": n, "lr": 1e-3} for n in ("decay", "no_decay")],
    )
    offline.write_checkpoint(tmp_path / "run" / "checkpoints", manifest, [lambda: pieces])
    assert main(["ckpt", "export", str(tmp_path / "run"), str(tmp_path / "out"), "--to", "dcp"]) == 0
    places = [str(tmp_path / name) for name in ("out", "nested", "flat")]
    finished(spawn(2, [str(HERE / "state_fsdp.py"), *places]))
    update()
    for name in ("nested", "flat"):
        run = tmp_path / f"{name}-run"
        assert len(list((tmp_path / name).glob("*.distcp"))) == 2
        assert main(["ckpt", "import", str(tmp_path / name), str(run), "--samples-seen", "96"]) == 0
        assert_same(states(run, 3), held())
        manifest = checkpoint.check(run / "checkpoints" / "step_00000003")
        assert {p.opt_step for p in manifest.parameters.values()} == {3}
