"""``import dattrain`` in one process: train twice, look at the run, and the notebook's cells as they stand."""

import json
import re
import subprocess
import sys
from pathlib import Path

import warm

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "docs" / "notebooks" / "first_hour.ipynb"
sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

TWICE = """
import sys
from pathlib import Path
import numpy as np
from PIL import Image
import dattrain
assert {"train", "Run"} <= set(dir(dattrain))
images, out = sys.argv[1:]
recipe = {"name": "small", "model": {"name": "dat_atto", "num_classes": 10, "img_size": 32},
          "data": {"train": Path(images), "val": images, "workers": 0}, "optim": {"lr": np.float64(1e-3)}, "schedule": {"epochs": 2, "warmup_epochs": 0},
          "train": {"global_batch": 16, "micro_batch": 16, "precision": "fp32", "threads": 1}}
stages = [(recipe, "mapping", {}), ("demo/pretrain", "name", {"model.img_size": 32, "zero.stage": 3}), (recipe, "mapping", {})]
for source, name, settings in stages:
    data = {"data.train": images, "data.val": images, "data.workers": 0, "data.lanes": 1, "train.global_batch": 16, "train.micro_batch": 16}
    run = dattrain.train(source, run=f"{out}/{name}", **{"train.max_steps": 2, **data, **settings})
    assert [row["step"] for row in run.metrics if "loss" in row] == [1, 2], run.metrics
    assert run.best["top1"] == max(row["top1"] for row in run.metrics if "top1" in row)
    assert run.config.train.max_steps == 2
found = run.evaluate(data=Path(images))
one = np.zeros((40, 30, 3), np.uint8)
assert len(run.predict(one)) == len(run.predict(Image.fromarray(one))) == 1 and len(run.predict(p for p in [one, one])) == 2
assert abs(found["top1"] - run.best["top1"]) < 1e-6, (found, run.best)
top = run.predict(images + "/bag", topk=3)
assert len(top[0]) == 3 and top[0][0].probability >= top[0][1].probability and isinstance(top[0][0].name, str)
model, cfg = dattrain.load_model(run)
assert cfg.num_classes == 10 and not model.training
try:
    dattrain.train("demo/pretrian")
except dattrain.errors.UserError as error:
    assert "did you mean demo/pretrain" in str(error)
else:
    raise AssertionError("a recipe that is not there was trained")
"""


def run(code: str, cwd: Path, *words: str) -> None:
    done = warm.run(
        [sys.executable, "-c", code, *words], cwd=cwd, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]


def test_training_twice_in_one_process(tmp_path):
    from fashion_images import image_folder

    run(TWICE, tmp_path, str(image_folder(tmp_path / "images", 40)), str(tmp_path / "runs"))


def test_importing_the_package_loads_nothing():
    code = "import dattrain, sys; print('torch' in sys.modules, 'pydantic' in sys.modules, dir(dattrain).count('train'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[:2] == ["False", "False"]


def test_the_notebook_runs_from_top_to_bottom(tmp_path):
    """Its cells, in one process with an event loop running as in a kernel, with fewer steps."""
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in cells)
    code = "\n".join("".join(cell["source"]) for cell in cells).replace("steps = 60", "steps = 4")
    assert "steps = 4" in code
    body = f"import asyncio\nasync def cells():\n    exec({code!r}, globals())\nasyncio.run(cells())\nassert figure.axes[3].collections"
    run(body, tmp_path)
    assert list((tmp_path / "first-hour" / "run" / "checkpoints").iterdir())


def test_the_readmes_lines_work_as_typed(tmp_path):
    from fashion_images import image_folder

    image_folder(tmp_path / "photos" / "train", 300, names=("cat", "dog") * 5)
    image_folder(tmp_path / "photos" / "val", 60, 1000, names=("cat", "dog") * 5)
    image_folder(tmp_path / "photos" / "new", 1, 2000, names=("",) * 10)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert '"train.max_steps": 200' in code
    run(
        code.replace(
            '"train.max_steps": 200',
            '"train.max_steps": 1, "train.global_batch": 16, "train.micro_batch": 16',
        ),
        tmp_path,
    )
