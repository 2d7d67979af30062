"""Configuration of the documentation site: ``make docs`` builds it in build/docs, and warnings are errors.

Pages are Markdown (MyST). The reference of the Python interface is generated from the docstrings: one page for each
class or function that the pages in reference/api list. If torch is not installed, it is mocked, so that the site is
complete everywhere.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import hashemb

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "hashemb"
author = "The hashemb developers"
copyright = author
version = release = hashemb.__version__

extensions = [
    "command_help",
    "mathml",
    "myst_parser",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
]
exclude_patterns = ["reference/generated/*.md"]
templates_path = ["_templates"]
default_role = "py:obj"  # `name` in a docstring links to the page of that name, if there is one
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autodoc_mock_imports = [] if importlib.util.find_spec("torch") else ["torch"]
importlib.import_module("hashemb.sklearn")  # before torch is mocked, which SciPy would take for the real one
autodoc_typehints = "none"  # the docstrings describe types
autodoc_member_order = "groupwise"
autosummary_generate = True
numpydoc_show_class_members = False  # the template of a class lists them
numpydoc_class_members_toctree = False


def skip_member(app: Any, what: str, name: str, obj: object, skip: bool, options: object) -> bool | None:
    """Leave out what a class inherits from other packages, and its fields, which its docstring describes."""
    function = getattr(obj, "fget", obj)
    module = getattr(function, "__module__", None) or ""
    is_hook = name in ("extra_repr", "get_extra_state", "set_extra_state")  # torch calls these, users do not
    return None if module.partition(".")[0] == "hashemb" and not is_hook else True


#: Classes whose objects are returned by functions: users read their attributes, and do not call the constructor.
RETURNED = {
    "hashemb": [
        "DeltaInfo", "EmbeddingTable", "FollowStatus", "Problem", "RowSample", "SnapshotInfo", "TableInfo",
        "TableStats",
    ],
    "hashemb.ctr": ["Batch", "Reader"],
    "hashemb.ctr.data": ["BadLine", "CountBuckets", "ReadReport"],
    "hashemb.ctr.metrics": ["CalibrationBin"],
    "hashemb.ctr.synthetic": ["Impressions"],
    "hashemb.ctr.training": ["ProgressRow", "TrainStep"],
}


def hide_constructor(
    app: Any, what: str, name: str, obj: object, options: object, signature: str | None, returned: str | None
) -> tuple[str, str] | None:
    """Show no arguments for the classes in `RETURNED`."""
    module, _, class_name = name.rpartition(".")
    return ("", "") if what == "class" and class_name in RETURNED.get(module, []) else None


def setup(app: Any) -> None:
    app.connect("autodoc-skip-member", skip_member)
    app.connect("autodoc-process-signature", hide_constructor)


html_math_renderer = "mathml"
html_theme = "pydata_sphinx_theme"
html_title = "hashemb"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    "header_links_before_dropdown": 6,
    "navigation_with_keys": False,
    "show_prev_next": False,
    "show_toc_level": 2,
    "navbar_align": "left",
    "footer_start": ["copyright"],
    "footer_end": ["theme-version"],
}
