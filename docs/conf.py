"""Builds the documentation: `make docs`."""

from __future__ import annotations

import sys
from pathlib import Path

import celery_eda

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "celery_eda"
author = "celery_eda contributors"
copyright = "celery_eda contributors"
release = version = celery_eda.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_click",
    "sphinxcontrib.mermaid",
    "reference",
]
exclude_patterns = ["_ext", "_build"]
html_theme = "furo"
html_title = "celery_eda"

myst_enable_extensions = ["colon_fence", "deflist", "attrs_block"]
myst_heading_anchors = 4
myst_fence_as_directive = ["mermaid"]
# Links to files that belong to the repository, and not to the site, lead to their text there.
suppress_warnings = ["myst.header"]

autodoc_typehints = "description"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
