"""How the pages become a site: sphinx-build -W docs site."""

import inspect
import os
import pathlib
import re
from typing import Any

os.environ["KERAS_BACKEND"] = "jax"  # a module of the reference imports Keras

import sphinx.util.logging

import swa_jax

project = "swa_jax"
author = copyright = "The swa_jax authors"
version = release = swa_jax.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["results"]  # tables and figures of single experiments
myst_heading_anchors = 4
myst_enable_extensions = ["fieldlist"]
html_theme = "furo"
html_title = f"swa_jax {release}"
html_static_path = ["static"]
html_css_files = ["tables.css"]
html_show_sphinx = False
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
python_maximum_signature_line_length = 88

_logger = sphinx.util.logging.getLogger(__name__)


def _complain_of_gaps(
    app: Any, what: str, name: str, found: Any, options: Any, lines: list[str]
) -> None:
    """Warn of what has no docstring, and of arguments that it does not describe."""
    if not any(lines):
        _logger.warning("%s has no docstring", name)
    if what not in ("function", "method") or name.startswith("swa_jax.typing"):
        return
    text = "\n".join(lines)
    section = re.search(r"^Args:\n((?:[ ]+.*\n|\n)*)", text + "\n", re.MULTILINE)
    described = section[1] if section else ""
    for argument in inspect.signature(found).parameters.values():
        if argument.name == "self" or argument.kind == argument.VAR_KEYWORD:
            continue
        if not re.search(rf"^ +[\w*, ]*\b{argument.name}\b[^:\n]*:", described, re.M):
            _logger.warning("%s does not describe %s", name, argument.name)


def _complain_of_names_left_out(app: Any) -> None:
    """Warn of public names that the reference does not have."""
    page = pathlib.Path(app.srcdir, "reference.md").read_text()
    for name in swa_jax.__all__:
        if not re.search(rf"^\.\. auto\w+:: {name}$", page, re.MULTILINE):
            _logger.warning("reference.md does not have %s", name)


def setup(app: Any) -> None:
    """Check as the pages are built, before napoleon rewrites the docstrings."""
    app.connect("builder-inited", _complain_of_names_left_out)
    app.connect("autodoc-process-docstring", _complain_of_gaps, priority=100)
