"""The check before DALI's device decoder is used, with real child processes that crash, hang and answer."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from dattrain.config.data_sections import Data
from dattrain.data.decode import dali, dali_base, dali_probe
from dattrain.data.decode.dali_pipeline import _decoding, device_of, require
from dattrain.data.decode.dali_probe import command, examine, versions, who
from dattrain.errors import UserError

pytest.importorskip("nvidia.dali")

USABLE = f"print({dali_probe._USABLE!r}, flush=True);"
CRASH = "import os, signal, resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); "
CRASH += "os.kill(os.getpid(), signal.SIGSEGV)"


def python(program: str) -> list[str]:
    return [sys.executable, "-S", "-c", program]


def check_names_what_to_do(message: str) -> None:
    assert versions() in message and "nvimgcodec" in versions()
    assert "data.decoder=cpu" in message and "nvidia-dali-cuda130==2.2.0" in message


@pytest.mark.parametrize(
    ("program", "says"),
    [
        (CRASH, "crashed with SIGSEGV"),
        (USABLE + "import time; time.sleep(60)", "did not come back in 0.5 s"),
        (USABLE + "raise SystemExit('nvImageCodec failure: #8')", "exit code 1 (nvImageCodec failure: #8)"),
        (USABLE + f"print({dali_probe._DECODED!r}, 97.25)", "97.25 levels of 255"),
    ],
)
def test_a_decoder_that_does_not_work_is_an_error(program, says):
    with pytest.raises(UserError) as caught:
        examine(python(program), 0.5 if "sleep" in program else 60)
    assert says in str(caught.value)
    check_names_what_to_do(str(caught.value))


@pytest.mark.parametrize(
    ("program", "says"),
    [
        ("raise SystemExit('all CUDA-capable devices are busy')", "could not use the GPU (all CUDA-capable"),
        (USABLE, "nothing of a decoded image"),
        (USABLE + f"print({dali_probe._DECODED!r}, 0.5)", "does not name the decoder"),
    ],
)
def test_what_cannot_be_told_is_unknown(program, says):
    verdict = examine(python(program), 60)
    assert verdict.startswith("unknown: ") and says in verdict


def test_who_decodes_is_read_from_the_log():
    """Lines as nvImageCodec 0.8 writes them; those of a GPU stand in its sources, src/image_generic_codec.h."""
    made = "[INFO] [nvimgcodec] create nvjpeg_hw_decoder load_hint 0.65 load_hint_policy 2\n"
    made += "[INFO] [nvimgcodec] decode num_samples=4\n"

    def asked(decoder, *images):
        return "".join(f"[INFO] [nvimgcodec] 0: {decoder} process #{image}\n" for image in images)

    def failed(*images):
        line = "[INFO] [nvimgcodec] nvjpeg_hw_decoder failed #{}. Trying next: nvjpeg_cuda_decoder\n"
        return "".join(line.format(image) for image in images)

    cuda = asked("nvjpeg_cuda_decoder", 0, 1, 2, 3)
    assert who(made + cuda) == who(made + failed(0, 1, 2) + cuda) == "GPU (nvjpeg_cuda_decoder)"
    assert who(made + cuda + asked("libjpeg_turbo_decoder", 0, 1, 2, 3)) == "CPU (libjpeg_turbo_decoder)"
    assert who(made) == "hardware engine (nvjpeg_hw_decoder)"
    assert who(made + asked("nvjpeg_cuda_decoder", 3)) == (
        "hardware engine (nvjpeg_hw_decoder) 3 of 4, GPU (nvjpeg_cuda_decoder) 1 of 4"
    )
    # What cannot be told.
    assert who(made + failed(2)).startswith("unknown")
    assert who(made.replace("hw", "other")).startswith("unknown")
    assert who(asked("nvjpeg_cuda_decoder", 0, 1, 2)).startswith("unknown")


def test_the_child_decodes_and_the_log_is_understood():
    """The child itself, on the CPU's decoder: what differs on a GPU is the device."""
    assert examine(command(device_of(None, Data())), 120) == "CPU (libjpeg_turbo_decoder)"


def test_the_check_comes_before_the_first_batch(monkeypatch):
    """On a GPU, and once: later pipelines of the process do not ask again."""
    asked = []

    def crash(device):
        asked.append(device)
        return python(CRASH)

    monkeypatch.setattr(dali_probe, "command", crash)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace())
    monkeypatch.setattr(dali.DaliDecoder, "_build", lambda self: pytest.fail("built before it was checked"))
    dali_probe.probe.cache_clear()

    def make(device):
        return dali.DaliDecoder(
            lambda number: pytest.fail("read before it was checked"),
            batch=1,
            size=(8, 8),
            skip_bad=False,
            interpolation="bilinear",
            data=Data(),
            device=torch.device(device),
        )

    with pytest.raises(UserError, match="SIGSEGV"):
        make("cuda:3")
    assert [device.id for device in asked] == [3]
    built = []
    monkeypatch.setattr(dali.DaliDecoder, "_build", lambda self: built.append(self))
    monkeypatch.setattr(dali_probe, "examine", lambda *a: "CPU (libjpeg_turbo_decoder)")
    messages = []
    monkeypatch.setattr(dali_base.log, "log", lambda level, *message: messages.append((level, message)))
    for _ in range(2):
        make("cuda:3").close()
    assert len(built) == len(messages) == 2 and len(asked) == 2
    assert messages[0] == (
        30,
        ("data.decoder=dali: regions of JPEGs are decoded by: %s", "CPU (libjpeg_turbo_decoder)"),
    )
    make("cpu").close()
    assert len(asked) == 2 and len(built) == 3
    dali_probe.probe.cache_clear()


def test_dali_knows_every_argument_of_the_device_decoder():
    """A graph with the mixed decoder can be written without a GPU: names and types are checked then."""
    from nvidia.dali import Pipeline

    fn, types = require()
    with Pipeline(batch_size=1, num_threads=1, device_id=0) as pipeline:
        files = fn.external_source(source=lambda: [], batch=True, no_copy=True)
        pipeline.set_outputs(fn.decoders.image(files, **_decoding(types, device_of(0, Data()))))
    arguments = _decoding(types, device_of(0, Data()))
    assert arguments["device"] == "mixed" and arguments["affine"] is False
    assert _decoding(types, device_of(None, Data())).keys() == {"device", "output_type", "adjust_orientation"}
