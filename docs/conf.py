"""The pages of docs/ as a site with search, and the Python API from the docstrings: `make docs`."""

import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import dattrain

project = "dattrain"
version = release = dattrain.__version__
html_title = f"dattrain {version}"
html_theme = "furo"
html_show_copyright = False
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["**/*.py", "site"]
myst_heading_anchors = 4
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
suppress_warnings = ["toc.not_included"]  # pages of figures are found from theirs

OUTSIDE = re.compile(r"\[((?:[^\[\]]|\[[^\]]*\])+)\]\(((?:\.\./)+)([^)#\s]*)[^)\s]*\)")


def _within(app: Any, name: str, source: list[str]) -> None:
    """A link that climbs out of docs/, which a repository page follows, becomes text that names the file."""
    depth = name.count("/") + 1

    def named(link: re.Match[str]) -> str:
        text, ups, path = link.groups()
        if ups.count("../") < depth:
            return link[0]
        return f"`{path}`" if path.endswith(text.strip("`")) else f"{text} (`{path}`)"

    source[0] = OUTSIDE.sub(named, source[0])


def setup(app: Any) -> None:
    """Register what is above."""
    app.connect("source-read", _within)
