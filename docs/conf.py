"""Configuration of the documentation's site: `nox -s docs` builds it."""

from __future__ import annotations

import sys
from importlib.metadata import version as installed
from pathlib import Path

sys.path.append(str(Path(__file__).parent))

project = "selfattn"
author = "The selfattn developers"
project_copyright = author
version = release = installed("selfattn")

extensions = [
    "myst_parser",
    "notebook_pages",  # in the same folder as this file
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
]
html_theme = "furo"
html_title = f"selfattn {release}"
html_copy_source = html_show_sourcelink = False

myst_enable_extensions = ["colon_fence"]  # ::: so that ``` always means a block of code
myst_heading_anchors = 4
suppress_warnings = ["myst.header"]  # decisions and fragments begin below the first level

# Signatures show names and defaults; the docstrings say which types and shapes are accepted.
autodoc_typehints = "none"
autodoc_member_order = "bysource"
autosummary_generate = False  # the reference has one page per topic, not one per name
numpydoc_show_class_members = False
default_role = "autolink"  # single backticks in docstrings link to what exists and are emphasised otherwise
# Other libraries' names are not linked: their inventories would have to be fetched.
nitpick_ignore_regex = [("py:.*", r"(?!selfattn).*")]
