"""Reads the guides, scripts in jupytext's percent format, as notebooks of Python."""

import jupytext
import nbformat


def read(text: str) -> nbformat.NotebookNode:
    """The notebook of a script; its kernel is that of the Python that builds the site."""
    notebook = jupytext.reads(text, fmt="py:percent")
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook.metadata["language_info"] = {"name": "python", "pygments_lexer": "ipython3"}
    return notebook
