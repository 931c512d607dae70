import pytest
import torch
from torch import nn

from dattrain.config.load import loads
from dattrain.engine import optim
from dattrain.engine.optim import AdamW, Run
from dattrain.errors import UserError

BASE = "model: {name: dat_atto, img_size: 32, num_classes: 10}\n"


def model():
    from dattrain.models import zoo

    torch.manual_seed(0)
    return zoo.create("dat_atto", num_classes=10, img_size=32)


@pytest.mark.parametrize("kind", [{"foreach": False}, {"foreach": True}, {"fused": True}])
def test_runs_of_a_flat_tensor_step_as_torch_does_with_a_group_per_rate(kind):
    torch.manual_seed(0)
    sizes, scales = [5, 130, 64, 1], [0.25, 0.5, 1.0, 0.25]
    flat = nn.Parameter(torch.randn(sum(sizes) + 3))  # three elements of padding that nobody owns
    parts = [nn.Parameter(p.clone()) for p in flat[: sum(sizes)].detach().split(sizes)]
    settings = {"betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1, **kind}
    ours = AdamW([flat], lr=1e-2, **settings)
    theirs = (
        AdamW if "fused" in kind else torch.optim.AdamW
    )  # torch's rounds what is left of vectors otherwise
    theirs = theirs([{"params": [p], "lr": 1e-2 * s} for p, s in zip(parts, scales)], **settings)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    ours.set_scales({flat: [Run(a, n, s) for a, n, s in zip(starts, sizes, scales)]})
    padding = flat[-3:].detach().clone()
    for step in range(5):
        flat.grad = torch.randn_like(flat)
        for p, g in zip(parts, flat.grad[: sum(sizes)].split(sizes)):
            p.grad = g.clone()
        for group, s in zip(theirs.param_groups, scales):
            group["lr"] = 1e-2 / (step + 1) * s
        ours.param_groups[0]["lr"] = 1e-2 / (step + 1)
        ours.step()
        theirs.step()
    assert torch.equal(flat[: sum(sizes)], torch.cat([p.detach() for p in parts]))
    assert torch.equal(flat[-3:], padding)
    held = ours.state[flat]
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(held[key][: sum(sizes)], torch.cat([theirs.state[p][key] for p in parts]))
    assert float(held["step"]) == 5


def test_neighbouring_runs_of_one_rate_are_joined_and_a_whole_one_steps_as_plain_adamw():
    flat = nn.Parameter(torch.ones(10))
    optimizer = AdamW([flat], lr=0.1)
    optimizer.set_scales({flat: [Run(5, 5, 1.0), Run(0, 5, 1.0)]})
    assert not optimizer._runs
    optimizer.set_scales({flat: [Run(5, 5, 0.5), Run(0, 5, 0.5)]})
    assert [run for _, runs in optimizer._runs.values() for run in runs] == [Run(0, 10, 0.5)]


@pytest.mark.parametrize("name", ["maximize", "amsgrad"])
def test_what_a_step_would_leave_out_is_refused(name):
    weight = nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match=f"without {name}"):
        AdamW([weight], fused=True, **{name: True})
    with pytest.raises(ValueError, match=f"without {name}"):
        AdamW([{"params": [weight], name: True}])


def test_groups_decay_matrices_alone():
    net = model()
    groups = {group["name"]: group for group in optim.param_groups(net, 0.05)}
    names = {id(p): n for n, p in net.named_parameters()}
    decayed = {names[id(p)] for p in groups["decay"]["params"]}
    assert groups["decay"]["weight_decay"] == 0.05 and groups["no_decay"]["weight_decay"] == 0.0
    assert {n for n, p in net.named_parameters() if p.dim() > 1 and "bias_table" not in n} == decayed
    assert sum(len(g["params"]) for g in groups.values()) == len(list(net.parameters()))


def test_a_linear_probe_trains_the_head_alone():
    net = model()
    config = loads(BASE + "optim: {freeze_backbone: true}").config
    optimizer = optim.build(net, config, torch.device("cpu"))
    trained = {n for n, p in net.named_parameters() if p.requires_grad}
    assert trained == {"head.fc.weight", "head.fc.bias"}
    assert sum(p.numel() for g in optimizer.param_groups for p in g["params"]) == 256 * 10 + 10
    net = model()
    net.reset_classifier(0)
    with pytest.raises(UserError, match=r"optim\.freeze_backbone=true"):
        optim.build(net, config, torch.device("cpu"))


def test_layer_scales_fall_from_the_head_to_the_stem():
    net = model()
    scales = optim.layer_scales(net, 0.5)
    assert scales["head.fc.weight"] == 1.0
    assert scales["patch_embed.proj.weight"] == 0.5**net.num_layers
    ordered = [scales[n] for n, _ in net.named_parameters()]
    assert ordered == sorted(ordered)
