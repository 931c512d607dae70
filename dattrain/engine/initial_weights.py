"""The weights that ``init.from`` names, read on rank 0 for all: what a fine-tune starts from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from dattrain.errors import UserError
from dattrain.runtime import collectives
from dattrain.state import gather
from dattrain.state.format import checkpoint


def shared_source(path: Path, *, ema: bool) -> tuple[dict[str, Tensor], str]:
    """Read as ``read_source``, on rank 0 for all. Collective.

    A thousand ranks that each read every shard would be a load of their own.
    """
    what = ""

    def read() -> Iterator[tuple[str, Tensor]]:
        nonlocal what
        tensors, what = read_source(path, ema=ema)
        yield from tensors.items()

    tensors = dict(collectives.tensors_from_first(read))
    return tensors, collectives.broadcast(what)


def read_source(path: Path, *, ema: bool) -> tuple[dict[str, Tensor], str]:
    """Read weights by name out of a run, a checkpoint or a safetensors file, and what they are.

    Raises:
        UserError: there is nothing of the kind; whose message does not name the setting. Pickles are not read: ``dattrain import`` does that, when asked to.
    """
    if path.is_file():
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path), "weights of a file"
        except (SafetensorError, OSError, ValueError) as error:
            hint = "; `dattrain import` reads pickles" if path.suffix in (".pth", ".pt", ".bin") else ""
            raise UserError(f"not a complete safetensors file ({error}){hint}") from None
    if not path.is_dir():
        raise UserError("no such run folder, checkpoint or file")
    folder = checkpoint.locate(path)
    manifest = checkpoint.check(folder)
    state: gather.State = "ema" if ema and "ema" in manifest.states else "param"
    what = f"step {manifest.step}" + (", EMA" if state == "ema" else "")
    return gather.load_tensors(folder, state), what
