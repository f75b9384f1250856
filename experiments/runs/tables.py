"""Tables: the one that a command prints at its end, and those in Markdown."""

import math

from experiments.runs.names import printable
from resflow_jax.models.certificate import Certificate


def certificate_rows(certificate: Certificate) -> dict[str, str]:
    """The lines of a closing table with the certified upper bounds of the flow."""
    unbounded = "; no Lipschitz bound for ".join(["", *certificate.unbounded_texts()])
    if not certificate.blocks:
        return {"certified": f"nothing: there are no residual blocks{unbounded}"}
    worst = max(certificate.blocks, key=lambda block: block.bound)
    if math.isinf(worst.target_bound):
        number = "the block has" if len(certificate.blocks) == 1 else f"{len(certificate.blocks)} blocks have"
        return {"certified": f"nothing: {number} no bound, and need not be invertible"}
    answer = "every block is invertible" if certificate.is_certified else "NOT EVERY BLOCK IS INVERTIBLE"
    return {
        "certified": f"{answer}: Lip(g) <= {worst.bound:.4f} in {len(certificate.blocks)} blocks (target "
        f"{worst.target_bound:.4f})",
        "whole flow": f"Lip(f) <= {certificate.lipschitz:.1e}, Lip(f^-1) <= {certificate.inverse_lipschitz:.1e}"
        + unbounded,
    }


def print_table(rows: dict[str, str]) -> None:
    """Prints a closing table."""
    for name, value in rows.items():
        shown = printable(str(value), keep="\n")
        print(f"{name:<23} {shown}")


def error_by_cause(data_stderr: float, noise_stderr: float) -> str:
    """The text of a closing table on the two parts of a standard error."""
    noise = (
        f"{noise_stderr:.4f} from noise" if math.isfinite(noise_stderr) else "an unknown part from noise (single draw)"
    )
    data = f"{data_stderr:.4f} from" if math.isfinite(data_stderr) else "an unknown part from"
    return f"{data} the choice of examples, {noise}"


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
