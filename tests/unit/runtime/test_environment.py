import contextlib
import math
import os
import resource
import tempfile
from dataclasses import replace

import pytest
import torch
from counting_store import GlooGroup

from dattrain.errors import UserError
from dattrain.runtime.environment import (
    FIRST_PORT,
    PORTS,
    configure,
    device_called,
    emulates_bf16,
    first_host,
    port_of,
    process_group,
    resolve,
)

SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NODELIST": "gpu[007-009,12]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
    "SLURMD_NODENAME": "gpu009",
}


@pytest.fixture
def torch_settings():
    """Those that ``configure`` changes, as they were."""
    import torch

    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    benchmark, deterministic = torch.backends.cudnn.benchmark, torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_float32_matmul_precision(products)
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = convolutions, benchmark
    torch.use_deterministic_algorithms(deterministic)


@pytest.mark.parametrize("tf32", [False, True])
def test_tf32_is_for_products_and_convolutions_alike(torch_settings, tf32):
    import torch

    configure(tf32=not tf32)
    configure(tf32=tf32)
    assert torch.backends.cuda.matmul.allow_tf32 is tf32
    assert torch.backends.cudnn.allow_tf32 is tf32
    # What torch.compile reads, and what the newer interface says of it.
    assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
    assert (torch.backends.cudnn.conv.fp32_precision == "tf32") is tf32


def test_ranks_of_a_node_share_a_cache_of_kernels_on_it(torch_settings, monkeypatch, tmp_path):
    def configured(**changes):
        os.environ.pop("TRITON_CACHE_DIR", None)
        configure(env=replace(resolve(SLURM, "box"), **changes))
        return os.environ.get("TRITON_CACHE_DIR")

    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    folder = tmp_path / f"dattrain-triton-{os.getuid()}"
    assert configured(local_world=1) is None and configured(world=1, local_world=0) is None
    assert configured() == str(folder) and folder.stat().st_mode & 0o777 == 0o700
    assert configured(local_world=0) == str(folder)  # the launcher does not say
    folder.chmod(0o777)
    assert configured() is None  # others may have put libraries there
    folder.rmdir()
    folder.symlink_to(tmp_path)
    assert configured() is None
    os.environ["TRITON_CACHE_DIR"] = "mine"
    configure(env=resolve(SLURM, "box"))
    assert os.environ["TRITON_CACHE_DIR"] == "mine"


def test_nothing_set_is_one_process():
    env = resolve({}, "box")
    assert (env.rank, env.world, env.launcher, env.host) == (0, 1, "single", "box")


def test_torchrun_and_our_launcher():
    told = {
        "RANK": "3",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "4",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "n1",
        "MASTER_PORT": "1234",
    }
    env = resolve(told, "box")
    assert (env.rank, env.local_rank, env.world, env.local_world) == (3, 1, 4, 2)
    assert (env.master_addr, env.master_port, env.launcher) == ("n1", 1234, "torchrun")
    assert resolve({**told, "DATTRAIN_LAUNCHER": "local"}).launcher == "local"
    # torchrun inside an allocation: torchrun knows better.
    assert resolve({**SLURM, **told}).rank == 3


def test_a_slurm_step():
    env = resolve(SLURM, "box")
    assert (env.rank, env.local_rank, env.world, env.local_world) == (5, 1, 8, 2)
    assert env.master_addr == "gpu007" and env.host == "gpu009" and env.launcher == "slurm"
    other = resolve({**SLURM, "SLURM_PROCID": "0"}, "box")
    assert other.master_port == env.master_port
    assert resolve({**SLURM, "SLURM_JOB_ID": "78"}).master_port != env.master_port
    assert resolve({**SLURM, "SLURM_STEP_ID": "1"}).master_port != env.master_port


def test_the_ranks_of_a_step_meet_where_they_are_told_to():
    told = resolve({**SLURM, "MASTER_ADDR": "jwb0001i", "MASTER_PORT": "23456"})
    assert (told.master_addr, told.master_port) == ("jwb0001i", 23456)
    # By a suffix it is another node's after a restart elsewhere.
    for suffix, nodes, found in (
        ("i", "jwb[0001-0002]", "jwb0001i"),
        (".cluster.local", "gpu[007-009]", "gpu007.cluster.local"),
        ("-ib0", "n1.old.domain,n2", "n1-ib0"),
        ("", "n1.domain,n2", "n1.domain"),
    ):
        environ = {**SLURM, "SLURM_STEP_NODELIST": nodes, "DATTRAIN_RENDEZVOUS_SUFFIX": suffix}
        assert resolve(environ).master_addr == found
        assert resolve({**environ, "MASTER_ADDR": "10.0.0.1"}).master_addr == "10.0.0.1"
    assert resolve({**SLURM, "MASTER_ADDR": ""}).master_addr == "gpu007"


@pytest.mark.parametrize("address", ["localhost", "localhost.localdomain", "127.0.0.1", "::1", "0.0.0.0"])
def test_no_node_is_the_other_nodes_localhost(address):
    several = {**SLURM, "SLURM_STEP_NUM_NODES": "4", "MASTER_ADDR": address}
    with pytest.raises(UserError, match=f"MASTER_ADDR={address} means another machine on each node"):
        resolve(several)
    assert resolve({**several, "SLURM_STEP_NUM_NODES": "1"}).master_addr == address


def test_a_batch_script_without_srun_is_one_process():
    batch = {key: value for key, value in SLURM.items() if "STEP" not in key}
    env = resolve({**batch, "SLURM_PROCID": "0"})
    assert (env.rank, env.world, env.launcher) == (0, 1, "single")


def test_submitits_local_executor():
    env = resolve(
        {
            "SUBMITIT_EXECUTOR": "local",
            "SUBMITIT_LOCAL_JOB_ID": "4242",
            "SUBMITIT_LOCAL_NTASKS": "2",
            "SUBMITIT_LOCAL_GLOBALID": "1",
            "SUBMITIT_LOCAL_LOCALID": "1",
        }
    )
    assert (env.rank, env.world, env.launcher, env.master_addr) == (1, 2, "submitit-local", "127.0.0.1")


@pytest.mark.parametrize(
    "nodes, first",
    [
        ("gpu[007-009,12]", "gpu007"),
        ("gpu3", "gpu3"),
        ("a1,b2", "a1"),
        ("rack[1-2]-node[3-4]", "rack1-node3"),
        ("n[10,11]x,m1", "n10x"),
    ],
)
def test_first_host(nodes, first):
    assert first_host(nodes) == first


@pytest.mark.parametrize(
    "environ, message",
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "without MASTER_ADDR"),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "0"},
            "MASTER_PORT=0 is no port",
        ),
        ({"RANK": "x", "WORLD_SIZE": "1"}, "RANK='x' is not a number"),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, "not within a world of 2"),
    ],
)
def test_variables_that_contradict_each_other(environ, message):
    with pytest.raises(UserError, match=message):
        resolve(environ)


def test_ports_lie_below_the_ephemeral_range():
    ports = {port_of(str(job)) for job in range(2000)}
    assert min(ports) >= FIRST_PORT and max(ports) < FIRST_PORT + PORTS < 32768
    assert len(ports) > 1800


@pytest.mark.parametrize("fails", [False, True], ids=["", "fails"])
def test_a_process_that_was_no_rank_is_none_after_its_group(fails, monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "1234")
    before = dict(os.environ)
    with contextlib.suppress(KeyError), process_group(resolve({}), torch.device("cpu")):
        assert os.environ["RANK"] == "0" and torch.distributed.is_initialized()
        with process_group(resolve({}), torch.device("cpu")):
            pass
        assert torch.distributed.is_initialized(), "it was there before"
        if fails:
            raise KeyError
    assert dict(os.environ) == before and not torch.distributed.is_initialized()


def test_ranks_that_have_nothing_to_say_to_each_other_do_not_connect():
    """gloo would connect all with all, each asking the one store for everybody's list of addresses: that grows as ranks cubed."""
    world = 16
    with process_group(resolve({}), torch.device("cpu")):
        group = GlooGroup(world)
        made = group.counts["set"], group.counts["get"], group.descriptors
        group.use()
    assert made[:2] == (world, 0) and made[2] <= 5 * world
    # By the algorithms: the ring of an all-reduce, the trees of a broadcast, the distances of a barrier, a gather's star.
    assert group.counts["get"] <= 2 * world * math.log2(world)
    assert group.counts["get bytes"] <= 256 * group.counts["get"]


def test_a_process_that_meets_others_may_open_as_many_files_as_the_hard_limit_lets_it():
    _, hard = before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, hard), hard))
    try:
        with process_group(resolve({}), torch.device("cpu")):
            raised, kept = resource.getrlimit(resource.RLIMIT_NOFILE)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert kept == hard
    assert raised == (1 << 20 if hard == resource.RLIM_INFINITY else min(hard, 1 << 20))


@pytest.mark.parametrize(
    "name, count, says",
    [
        ("cuda", 0, "device=cuda: no CUDA device here; use cpu"),
        ("cuda:1", 1, "device=cuda:1: this machine has cuda:0 alone"),
        ("cuda:7", 4, "device=cuda:7: this machine has cuda:0 to cuda:3"),
        ("gpu", 4, "device=gpu: there is none of that name; write cpu, cuda or cuda:1"),
    ],
)
def test_a_device_that_is_not_there_is_named_with_what_is(name, count, says, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(UserError) as error:
        device_called(name)
    assert str(error.value) == says
    assert device_called("cpu") == torch.device("cpu")
    assert count == 0 or device_called(f"cuda:{count - 1}").index == count - 1


def test_a_cpu_says_whether_it_multiplies_bf16():
    x86 = "processor : 0\nflags : fpu avx2 avx512f {}\nbogomips : 1\n"
    assert emulates_bf16(x86.format("")) and emulates_bf16(x86.format("avx512_bf16x"))
    assert not emulates_bf16(x86.format("avx512_bf16"))
    assert not emulates_bf16(x86.format("amx_tile amx_bf16"))
    assert emulates_bf16("Features : fp asimd\n")
    assert not emulates_bf16("Features : fp asimd i8mm bf16\n")
    assert not emulates_bf16("nothing of the kind")
