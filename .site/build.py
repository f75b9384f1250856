"""Builds the site: the pages, the guides with their pictures, and the reference of every public name.

    pip install -e '.[docs]' && python .site/build.py

writes build/site/html; build/site/html/index.html is the first page. A warning of Sphinx is an error.

The sources are put together in build/site/source, with the paths that they have in the repository, so that the links
between them stay right: the pages in Markdown, the guides, `index.md` of this folder, and what `reference.py` writes.
The guides are run, which takes some minutes, and their outputs kept in build/site/cache until a guide changes.
`--no-run` leaves the pictures out; `--fresh` runs all guides again.
"""

import argparse
import os
import re
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).parent.resolve()
ROOT = HERE.parent
SITE = ROOT / "build" / "site"
GUIDES = ROOT / "experiments" / "guides"
FOLDERS = (".github", "experiments", "resflow_jax")  # of pages, pictures, guides, and files that pages refer to
FILES = ("README.md", "CHANGELOG.md", "LICENSE", "pyproject.toml")
LINK = re.compile(r"(?<!!)\[([^][]*)\]\((?!\w+:|#)([^()#\s]+)(#[^()\s]*)?\)")  # [text](path#section), no address


def main(arguments: list[str] | None = None) -> int:
    """Builds the site and returns the exit status of Sphinx."""
    parser = argparse.ArgumentParser(description="Build the site in build/site/html.")
    parser.add_argument("--no-run", action="store_true", help="do not run the guides: no pictures")
    parser.add_argument("--fresh", action="store_true", help="forget what earlier builds made, outputs of guides too")
    options = parser.parse_args(arguments)
    if options.fresh:
        shutil.rmtree(SITE, ignore_errors=True)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])  # of guides
    sys.path[:0] = [str(HERE), str(ROOT)]
    shutil.rmtree(SITE / "html", ignore_errors=True)  # pages that are no more
    gather(SITE / "source")
    from sphinx.cmd.build import build_main  # needed from here on only

    run = ["-D", "nb_execution_mode=off"] if options.no_run else []
    html = str(SITE / "html")
    return build_main(["-W", "--keep-going", "-q", "-c", str(HERE), *run, str(SITE / "source"), html])


def gather(source: Path) -> None:
    """Puts the sources of the site together."""
    import reference  # beside this file

    shutil.rmtree(source, ignore_errors=True)
    source.mkdir(parents=True)
    no_caches = shutil.ignore_patterns("__pycache__")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=no_caches)
    for file in FILES:
        shutil.copy2(ROOT / file, source / file)
    shutil.copy2(HERE / "index.md", source / "index.md")
    for page in source.rglob("*.md"):
        page.write_text(LINK.sub(lambda link, page=page: _as_on_site(link, page, source), page.read_text()))
    reference.write(source / "reference")


def _as_on_site(link: re.Match, page: Path, source: Path) -> str:
    """A link of a page: to a folder it goes to its README, or becomes text where it has none; to code, to a copy."""
    text, path, section = link.groups()
    target = Path(os.path.normpath(page.parent / path))
    if not target.is_relative_to(source):
        return link[0]
    original = ROOT / target.relative_to(source)
    if original.is_dir():
        return f"[{text}]({path.rstrip('/')}/README.md{section or ''})" if (original / "README.md").exists() else text
    if original.suffix == ".py" and original.is_file() and original.parent != GUIDES:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(original, target.with_name(f"{target.name}.txt"))
        return f"[{text}]({path}.txt)"
    return link[0]


if __name__ == "__main__":
    sys.exit(main())
