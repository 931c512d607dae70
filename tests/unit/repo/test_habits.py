"""What hosts of the repository read (workflow, forms, citation) and what pyproject.toml says are one thing; the pages make a site."""

import importlib.util
import re
import subprocess
import sys
from fnmatch import fnmatch

import pytest
import yaml
from test_dependencies import ROOT, tomllib

import dattrain

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
JOBS = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]


def test_no_folder_of_tests_is_left_out(pytestconfig):
    """pytest's own ``norecursedirs`` has ``dist``."""
    for path in (ROOT / "tests").rglob("test_*.py"):
        for folder in path.relative_to(ROOT).parts[:-1]:
            assert not any(fnmatch(folder, pattern) for pattern in pytestconfig.getini("norecursedirs")), path


def test_the_workflow_runs_every_python_that_is_declared():
    declared = [c.rpartition(":: ")[2] for c in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", c)]
    assert JOBS["locked"]["strategy"]["matrix"]["python"] == declared
    assert PROJECT["requires-python"] == f">={declared[0]}"


def test_the_workflow_runs_the_oldest_torch_that_is_allowed_and_the_newest():
    oldest, newest = JOBS["torch"]["strategy"]["matrix"]["include"]
    for name in ("torch", "torchvision"):
        assert oldest[name].replace("==", ">=").removesuffix(".*") in PROJECT["dependencies"]
        assert newest[name] == name
    assert [oldest["python"], newest["python"]] == [
        JOBS["locked"]["strategy"]["matrix"]["python"][i] for i in (0, -1)
    ]


def test_the_workflow_calls_what_the_makefile_has():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    called = {
        word
        for job in JOBS.values()
        for step in job["steps"]
        for word in re.findall(r"^make (\S+)", step.get("run", ""), re.MULTILINE)
    }
    assert {"test", "docs", "coverage"} <= called <= targets


@pytest.mark.parametrize(
    "path", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda p: p.stem
)
def test_an_issue_form_has_what_hosts_ask_for(path):
    form = yaml.safe_load(path.read_text())
    assert form["name"] and form["description"]
    for part in form["body"]:
        assert part["type"] in ("markdown", "textarea", "input", "dropdown", "checkboxes")
        assert part["attributes"].get("label") or part["type"] == "markdown"


def test_the_citation_is_of_this_version():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (
        cited["version"] == dattrain.__version__ == PROJECT["version"]
        and cited["license"] == PROJECT["license"]
    )
    assert {i["value"] for r in cited["references"] for i in r["identifiers"]} == {
        "arXiv:2201.00520",
        "arXiv:2309.01430",
    }


@pytest.mark.skipif(sys.version_info < (3, 11), reason="sphinx's pinned release needs Python 3.11")
def test_the_pages_make_a_site_without_a_warning(tmp_path):
    """Broken links and anchors, names that the API page lists and the package lacks, docstrings that are no markup."""
    assert importlib.util.find_spec("sphinx")
    words = ["-q", "-W", "--keep-going", "-b", "html", str(ROOT / "docs"), str(tmp_path / "site")]
    done = subprocess.run([sys.executable, "-m", "sphinx", *words], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site" / "api.html").read_text()
    listed = re.findall(r"auto(?:function|class):: (\S+)", (ROOT / "docs" / "api.md").read_text())
    public = [getattr(dattrain, name) for name in dattrain.__all__ if name != "__version__"]
    listed += [f"{each.__module__}.{each.__name__}" for each in public]
    assert len(listed) > 15 and not [name for name in listed if f'id="{name}"' not in page]
    # A link out of docs/, which a site cannot follow, names its file.
    assert "launch/clusters/h100x8-infiniband.yaml" in (tmp_path / "site" / "slurm.html").read_text()
