"""Settings of Sphinx for the site; `build.py` calls it."""

import sys
from pathlib import Path

HERE = Path(__file__).parent.resolve()
sys.path[:0] = [str(HERE), str(HERE.parent)]

import docstrings  # noqa: E402
import reference  # noqa: E402

import resflow_jax  # noqa: E402

project = "resflow_jax"
author = "The resflow_jax developers"
copyright = author
version = release = resflow_jax.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.githubpages",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
include_patterns = [
    "index.md",
    "README.md",
    "CHANGELOG.md",
    ".github/*.md",
    "**/README.md",
    "reference/*.rst",
    "experiments/guides/*.py",
]

# the guides: scripts in jupytext's percent format, run by Jupyter in a folder that is removed
nb_custom_formats = {".py": "guides.read"}
nb_execution_mode = "cache"
nb_execution_cache_path = str(HERE.parent / "build" / "site" / "cache")
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = 900
nb_output_stderr = "remove"
nb_merge_streams = True
myst_enable_extensions = ["dollarmath"]
myst_fence_as_directive = ["math"]
myst_heading_anchors = 4
suppress_warnings = [
    "toc.empty_glob",  # a folder without a page
    "myst.header",  # a page may skip a level of headings
]

# the reference: docstrings of Google's style with formulas in ASCII, which `docstrings` makes reST of
autoclass_content = "both"
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
maximum_signature_line_length = 90
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Attributes", "params_style")]
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = f"resflow_jax {version}"
html_copy_source = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


def setup(app):
    """Connects what this folder adds to Sphinx."""
    app.connect("autodoc-process-docstring", docstrings.process, priority=400)  # before napoleon
    app.connect("autodoc-process-signature", docstrings.signature)
    app.connect("missing-reference", reference.resolve)
