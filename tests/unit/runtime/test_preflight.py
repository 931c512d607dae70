import socket

import pytest

from dattrain.errors import UserError
from dattrain.runtime import preflight
from dattrain.runtime.env import Env


def env(**changes):
    told = {
        "rank": 0,
        "local_rank": 0,
        "world": 2,
        "local_world": 2,
        "master_addr": "127.0.0.1",
        "master_port": 0,
        "launcher": "slurm",
        "host": "node7",
    }
    return Env(**{**told, **changes})


def test_a_master_that_does_not_resolve_is_named_with_the_node_that_looked():
    with pytest.raises(
        UserError, match=r"node7: the host of rank 0, 'nowhere\.invalid', does not resolve.*rendezvous_suffix"
    ):
        preflight.reach(env(rank=1, master_addr="nowhere.invalid"), timeout_s=0.0)


def test_a_port_that_is_taken_is_named():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"node7: port {port} cannot be opened"):
            preflight.reach(env(master_port=port))
        preflight.reach(env(master_port=port, rank=1))  # only rank 0 opens it
    preflight.reach(env(master_port=port))


def test_one_process_needs_no_network():
    preflight.reach(env(world=1, master_addr="nowhere.invalid"))
