"""Python processes that start warm: forks of one server that has imported torch, DeepSpeed and the trainer, 5 to 8 s of CPU.

``Popen`` and ``run`` are those of ``subprocess``: arguments, environment, folder, streams, signals and exit codes are as in
a process of its own, also for the Python processes that such a process starts (a launcher's ranks). Where the start itself
is what is tested, use ``subprocess``. Commands that are no ``python -m``, ``python -c`` or ``python FILE.py`` start cold, and so does
all of it where CUDA is, which cannot be used in forks.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import inspect
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import types
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

PRELOAD = (
    "deepspeed",
    "dattrain.cli.main",
    "dattrain.data.factory",
    "dattrain.engine.train",
    "dattrain.state.checkpointer",
    "dattrain.cli.train",
    "torch.utils.tensorboard",
    # What deepspeed.initialize imports late; wherever another release has it, only speed is lost.
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "torch.utils.cpp_extension",
)
AT_IMPORT = ("TRITON_INTERPRET", "DS_ACCELERATOR")
"""Variables that are read while something is imported."""
COLD = sys.platform != "linux" or Path("/dev/nvidiactl").exists()
SIGNATURE = inspect.signature(subprocess.Popen._execute_child)  # type: ignore[attr-defined]


def startable(call: dict[str, Any]) -> bool:
    """Whether a fork can stand in for what is asked of ``Popen``."""
    command, environment = call["args"], call["env"] or os.environ
    special = call["shell"] or call["executable"] not in (None, sys.executable) or call["pass_fds"]
    if special or not isinstance(command, (list, tuple)) or os.fspath(command[0]) != sys.executable:
        return False
    what = words(command)[0]
    python = what in ("-m", "-c") or what.endswith(".py")
    return python and all(environment.get(name) == os.environ.get(name) for name in AT_IMPORT)


def words(command: Sequence[Any]) -> list[str]:
    """A Python command line without Python, and without its ``-u``."""
    found = [os.fspath(word) for word in command[1:]] or [""]
    return found[found[0] == "-u" :]


def become(command: list[str], cwd: str | None, environment: dict[str, str], new_session: bool) -> NoReturn:
    """In a fork: what ``python *command`` does, to the end of the process."""
    code: object = 0
    try:
        for number in signal.valid_signals():
            if callable(signal.getsignal(number)) or number == signal.SIGINT:
                signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if new_session:
            os.setsid()
        os.chdir(cwd or ".")
        os.environ.clear()
        os.environ.update(environment)
        # The server's know its descriptors, which may be files where these are pipes.
        buffering = 1 if environment.get("PYTHONUNBUFFERED") else -1
        sys.stdout = sys.__stdout__ = os.fdopen(1, "w", buffering, closefd=False)  # type: ignore[misc]
        sys.stderr = sys.__stderr__ = os.fdopen(2, "w", 1, errors="backslashreplace", closefd=False)  # type: ignore[misc]
        if environment.get("PYTHONWARNINGS") == "ignore":
            warnings.simplefilter("ignore")
        subprocess.Popen = Forked  # type: ignore[misc]
        what, rest = command[0], command[1:]
        sys.path[0] = str(Path(what).parent) if what.endswith(".py") else ""
        sys.path[1:1] = [p for p in environment.get("PYTHONPATH", "").split(os.pathsep) if p not in sys.path]
        if what == "-m":
            sys.argv = rest
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        elif what == "-c":
            sys.argv = ["-c", *rest[1:]]
            sys.modules["__main__"] = main = types.ModuleType("__main__")
            exec(rest[0], main.__dict__)
        else:
            sys.argv = command
            runpy.run_path(what, run_name="__main__")
    except SystemExit as end:
        code = end.code
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        code = 1
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


def preload() -> None:
    """Import what forks then have."""
    for name in PRELOAD:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.freeze()


class Forked(subprocess.Popen):  # type: ignore[type-arg]
    """In a warm process: its own Python processes are forks of it."""

    def _execute_child(self, *arguments: Any) -> None:
        call = SIGNATURE.bind(self, *arguments).arguments
        if not startable(call):
            super()._execute_child(*arguments)  # type: ignore[misc]
            return
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            for name in ("p2cwrite", "c2pread", "errread"):
                if call[name] != -1:
                    os.close(call[name])
            for number, name in enumerate(("p2cread", "c2pwrite", "errwrite")):
                if call[name] != -1:
                    os.dup2(call[name], number)
            if call["preexec_fn"]:
                call["preexec_fn"]()
            become(
                words(call["args"]), call["cwd"], dict(call["env"] or os.environ), call["start_new_session"]
            )
        self._child_created = True
        self._close_pipe_fds(
            *(call[n] for n in ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite"))
        )  # type: ignore[attr-defined]


class Server:
    """The process that forks, and the way to it."""

    def __init__(self) -> None:
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._lock = threading.Lock()
        root = str(Path(__file__).parents[1])
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())], pass_fds=[theirs.fileno()], env=environment, cwd=root
        )  # fmt: skip
        theirs.close()

    def ask(self, request: dict[str, Any], descriptors: tuple[int, ...] = ()) -> Any:
        """Its answer."""
        with self._lock:
            socket.send_fds(self._ours, [json.dumps(request).encode()], descriptors)
            answer = self._ours.recv(1 << 12)
        if not answer:
            raise RuntimeError("the server of warm processes has ended")
        return json.loads(answer)

    def end(self) -> None:
        """It ends what still runs, and itself."""
        self._ours.close()
        self.process.wait()


_server: Server | None = None


def server() -> Server:
    """This process's, started when first needed."""
    global _server
    if _server is None:
        _server = Server()
        atexit.register(_server.end)
    return _server


class Popen(subprocess.Popen):  # type: ignore[type-arg]
    """``subprocess.Popen`` of a warm Python."""

    _warm = False

    def _execute_child(self, *arguments: Any) -> None:
        call = SIGNATURE.bind(self, *arguments).arguments
        if COLD or not startable(call) or call["preexec_fn"]:
            super()._execute_child(*arguments)  # type: ignore[misc]
            return
        streams = tuple(
            number if call[name] == -1 else call[name]
            for number, name in enumerate(("p2cread", "c2pwrite", "errwrite"))
        )
        request = {
            "command": words(call["args"]),
            "cwd": os.path.abspath(call["cwd"] or "."),
            "environment": dict(call["env"] or os.environ),
            "new_session": call["start_new_session"],
        }
        sys.stdout.flush()
        self._warm = True
        self.pid = server().ask(request, streams)
        self._child_created = True
        self._close_pipe_fds(
            *(call[n] for n in ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite"))
        )  # type: ignore[attr-defined]

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        if not self._warm:
            return super()._try_wait(wait_flags)  # type: ignore[misc]
        status = server().ask({"wait": self.pid})
        if status is None and not wait_flags & os.WNOHANG:
            time.sleep(0.02)
        return (0, 0) if status is None else (self.pid, status)

    def _internal_poll(self, *arguments: Any, **keywords: Any) -> int | None:
        if not self._warm:
            return super()._internal_poll(*arguments, **keywords)  # type: ignore[misc]
        if self.returncode is None:
            pid, status = self._try_wait(os.WNOHANG)
            if pid:
                self._handle_exitstatus(status)  # type: ignore[attr-defined]
        return self.returncode


def run(
    command: list[str], *, capture_output: bool = False, timeout: float | None = None, **keywords: Any
) -> subprocess.CompletedProcess[Any]:
    """``subprocess.run`` of a warm Python."""
    if capture_output:
        keywords.update(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with Popen(command, **keywords) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def main(descriptor: int) -> None:
    """Import, then fork for every request until the other side closes."""
    channel = socket.socket(fileno=descriptor)
    preload()
    ended: dict[int, int] = {}
    running: set[int] = set()
    while True:
        data, descriptors, *_ = socket.recv_fds(channel, 1 << 20, 3)
        if not data:
            break
        request = json.loads(data)
        if "wait" in request:
            pid = request["wait"]
            if pid in running:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    running.discard(pid)
                    ended[pid] = status
            channel.send(json.dumps(ended.get(pid)).encode())
            continue
        pid = os.fork()
        if pid == 0:
            channel.close()
            for number, given in enumerate(descriptors):
                os.dup2(given, number)
            for given in descriptors:
                os.close(given)
            become(**request)
        for given in descriptors:
            os.close(given)
        running.add(pid)
        channel.send(json.dumps(pid).encode())
    for pid in running:
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main(int(sys.argv[1]))
