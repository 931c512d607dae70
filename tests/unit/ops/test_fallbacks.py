"""Without the native library: every operator's own fallback, training, and where the library goes when there is no home."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from torch import nn

from dattrain.models import VARIANTS, create
from dattrain.ops import depthwise, dispatch, sampling, windows
from dattrain.ops.cpp import build
from dattrain.ops.deformable_attention import torch_op

WIDE = torch.float64
NEEDS_NATIVE = pytest.mark.skipif(not build.status()[0], reason=build.status()[1])


@pytest.fixture
def asked_anew():
    """The library is looked for again, within the test and after it."""
    cached = (build.status, build._compiled)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


@pytest.fixture
def no_library(asked_anew, monkeypatch):
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("CXX", "/bin/false")
    monkeypatch.setenv("HOME", "/dev/null")
    assert not build.status()[0]


def leaf(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randn(*shape, generator=generator, dtype=WIDE, requires_grad=True)


OPERATORS = {
    "sample": (lambda x, p: sampling._sample(x, p, "native"), (leaf(2, 4, 3, 6), leaf(2, 3, 5, 2))),
    "depthwise": (lambda *i: depthwise._depthwise(*i, 2), (leaf(2, 4, 3, 6), leaf(3, 1, 3, 3), leaf(3))),
    "windows": (lambda *i: windows._windows(*i, None, 2)[0], (leaf(2, 3, 4, 12), leaf(2, 4, 4))),
    "shifted windows": (
        lambda *i: windows._windows(*i, -100 * torch.eye(4, dtype=WIDE).expand(3, 4, 4), 2)[0],
        (leaf(2, 3, 4, 12), leaf(2, 4, 4)),
    ),
    "attention": (
        lambda *i: torch_op.attention(*i, 2, 3, "center", 0.5, "native")[0],
        (leaf(1, 2, 6, 4), leaf(1, 2, 5, 4), leaf(1, 2, 5, 4), leaf(1, 1, 5, 2), leaf(2, 3, 5)),
    ),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_by_itself_has_gradients(name, no_library):
    operator, inputs = OPERATORS[name]
    assert torch.autograd.gradcheck(operator, inputs)


@pytest.mark.parametrize("name", ["sample", "depthwise", "windows", "shifted windows"])
@NEEDS_NATIVE
def test_a_fallback_gives_what_the_library_gives_in_bf16_too(name, request):
    operator, inputs = OPERATORS[name]
    narrow = [x.detach().bfloat16() if i == 0 else x.detach().float() for i, x in enumerate(inputs)]
    if name == "shifted windows":
        operator = lambda *i: windows._windows(*i, -100 * torch.eye(4).expand(3, 4, 4), 2)[0]  # noqa: E731

    def run():
        leaves = [x.clone().requires_grad_() for x in narrow]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = operator(*leaves)
        return out, *torch.autograd.grad(out.float().square().sum(), leaves)

    wanted = run()
    request.getfixturevalue("no_library")
    for a, b in zip(run(), wanted):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    "name, overrides",
    [
        ("dat_tiny", {}),
        ("dat_pp_tiny", {"blocks": ("ND", "ND", "ND", "DD")}),
        ("dat_tiny", {"blocks": ("LS", "LS", "LS", "LS"), "shift": "floor"}),
    ],
    ids=["DAT", "DAT++", "Swin"],
)
def test_a_step_trains_without_compiler_and_home(name, overrides, no_library):
    torch.manual_seed(0)
    dims = tuple(8 * heads for heads in VARIANTS[name]["heads"])
    model = create(name, num_classes=3, img_size=64, dims=dims, **overrides)
    images, labels = torch.randn(2, 3, 64, 64), torch.tensor([0, 2])
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    losses = []
    for _ in range(2):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert losses[1] < losses[0]


class TestWhereTheLibraryIsKept:
    @pytest.fixture(autouse=True)
    def _copied(self, asked_anew, monkeypatch, tmp_path):
        """Compiling is copying; the machine's folder for temporary files is the test's."""
        if not build.status()[0]:
            pytest.skip(build.status()[1])
        file = build._compiled()[1]
        self.name = file.name
        for function in (build.status, build._compiled):
            function.cache_clear()
        monkeypatch.setattr(build, "_compile", lambda compiler, arch, path: shutil.copy(file, path))
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def test_a_user_without_a_home(self, monkeypatch, tmp_path):
        def home():
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(Path, "home", home)
        runs, why = build.status()
        assert runs and str(tmp_path) in why
        (folder,) = tmp_path.iterdir()
        assert folder.stat().st_mode & 0o777 == 0o700

    def test_a_home_that_cannot_be_written(self, monkeypatch, tmp_path):
        monkeypatch.setenv("HOME", "/dev/null")
        assert build.status()[0] and str(tmp_path) in build.status()[1]

    def test_a_cache_whose_files_cannot_be_loaded(self, monkeypatch, tmp_path):
        cache = tmp_path / "cache"
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
        (cache / "dattrain").mkdir(parents=True)
        (cache / "dattrain" / self.name).write_bytes(b"cut short")
        assert build.status()[0] and str(cache) not in build.status()[1]

    def test_a_folder_that_others_can_write_is_not_loaded_from(self, monkeypatch, tmp_path):
        monkeypatch.setenv("HOME", "/dev/null")
        build._own_temporary().chmod(0o777)
        runs, why = build.status()
        assert not runs and "not this user's alone" in why
        assert dispatch.resolve(torch.zeros(1), None) == "torch"
