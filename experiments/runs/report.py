"""report.html: one self-contained page on a run with its pictures, to be read without a network."""

import base64
import json
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

from experiments.runs.workdir import write_atomically
from resflow_jax import Certificate

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.15rem; margin-top: 2rem }
table { border-collapse: collapse } td, th { padding: .15rem .8rem .15rem 0; text-align: left; vertical-align: top }
th { font-weight: 600; white-space: nowrap } table.numbers td { text-align: right; font-variant-numeric: tabular-nums }
tr + tr > * { border-top: 1px solid #ddd }
.sketches { display: grid; grid-template-columns: repeat(3, 1fr); gap: 1rem } .sketches figure { margin: 0 }
figure { margin: 1rem 0 } img { max-width: 100% } figcaption { color: #666 }
pre { background: #f6f6f6; padding: 1rem; overflow-x: auto }
"""  # noqa: E501


def write_report(
    path: Path,
    title: str,
    rows: dict[str, str],
    pictures: dict[str, Path],
    along_training: dict[str, Path],
    certificate: Certificate,
    config: Any,
) -> None:
    """Writes the page: the closing table, pictures by caption, the certificate of every block, the config as JSON."""
    figures, sketches = (
        "\n".join(_figure(caption, picture) for caption, picture in group.items())
        for group in (pictures, along_training)
    )
    blocks = _table(
        ("block", "Lip(g) at most", "target"),
        ((f"{n}", f"{b.bound:.4f}", f"{b.target_bound:.4f}") for n, b in enumerate(certificate.blocks, start=1)),
    )
    closing = "\n".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows.items())
    write_atomically(
        path,
        f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>
<style>{_STYLE}</style></head>
<body>
<h1>{escape(title)}</h1>
<table>{closing}</table>
<h2>Pictures</h2>
{figures}
<h2>Along training</h2>
<div class="sketches">
{sketches}
</div>
<h2>Certificate</h2>
{blocks}
<h2>Config</h2>
<pre>{escape(json.dumps(config, indent=2))}</pre>
</body>
</html>
""",
    )


def _figure(caption: str, picture: Path) -> str:
    data = base64.b64encode(picture.read_bytes()).decode()
    caption = escape(caption)
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>'
    )


def _table(head: Iterable[str], body: Iterable[Iterable[str]]) -> str:
    lines = ["".join(f"<th>{escape(cell)}</th>" for cell in head)]
    lines += ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in body]
    return '<table class="numbers">' + "\n".join(f"<tr>{line}</tr>" for line in lines) + "</table>"
