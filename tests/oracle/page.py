"""The table as a page of the documentation."""

from __future__ import annotations

from collections import Counter

from .verdicts import CANNOT_ACT, CRASH, NAMED, REFUSED, RIGHT, SITES, UNCHECKED, WRONG, Row, Verdict

_INTRODUCTION = """# Models

What this package does on every causal language model of transformers, at a tiny random size, compared with an oracle
that shares no code with it. `python -m tests.oracle.table --markdown docs/models.md` writes this page; it was
last written with transformers {transformers} and PyTorch {torch}. Vision-language models are given text alone.

- **right**: the logits are those of plain hooks (whole sites), or of heads scaled where transformers' attention
  function returns them, to 1e-6 of the effect in float64 (1e-3 where a model is float32 only).
- **right when named**: `for_model` asks for module paths, and with those in the footnote it is right.
- **cannot act**: right, but a norm follows, so that only the sign of a factor gets through.
- **refused**: the call raises an error that says why; the footnote has it, with the paths that were named, if any.
- **unchecked**: there is nothing to compare with; see the footnote.
- **generate**: cached generation with positions under left padding has the logits of whole passes without a cache, one
  prompt at a time. **fit**: its terms and their gradient are those of such passes.
"""


def summary(rows: list[Row]) -> dict[str, int]:
    """How many architectures there are of each kind."""
    ran = [row for row in rows if not row.made]
    every = Counter(verdict.verdict for row in ran for verdict in row.verdicts)
    sites = Counter(verdict.verdict for row in ran for verdict in row.sites.values())

    def some(row: Row, verdict: str) -> bool:
        return any(found.verdict == verdict for found in row.sites.values())

    return {
        "architectures": len(rows),
        "run": len(ran),
        "right at the head site or at a whole site": sum(some(row, RIGHT) for row in ran),
        "right only when named": sum(some(row, NAMED) and not some(row, RIGHT) for row in ran),
        "right at the head site": sum(row.sites["head"].verdict == RIGHT for row in ran),
        "right in cached generation": sum(row.generate.verdict == RIGHT for row in ran),
        "right in fit": sum(row.fit.verdict == RIGHT for row in ran),
        "silently wrong": every[WRONG],
        "unnamed errors": every[CRASH],
        "sites accepted without an oracle": sites[UNCHECKED],
        "refusals": every[REFUSED],
        "sites that cannot act": sites[CANNOT_ACT],
    }


def markdown(rows: list[Row]) -> str:
    """The table for the documentation."""
    import torch
    import transformers

    lines = [
        _INTRODUCTION.format(transformers=transformers.__version__, torch=torch.__version__),
        "| | |",
        "|---|---|",
        *(f"| {name} | {count} |" for name, count in summary(rows).items()),
        "",
        "| model type | class | head | attn_out | mlp_out | residual | generate | fit |",
        "|---|---|---|---|---|---|---|---|",
    ]
    reasons: dict[str, int] = {}
    for row in sorted(rows, key=lambda row: row.model_type):
        if row.made:
            cells = [f"not run[^{_number(reasons, row.made)}]"] + [""] * 5
        else:
            cells = [_cell(row.sites[site], reasons) for site in SITES]
            cells += [_cell(row.generate, reasons), _cell(row.fit, reasons)]
        lines.append(f"| {row.model_type} | {row.name} | {' | '.join(cells)} |")
    lines += ["", *(f"[^{number}]: {reason}" for reason, number in reasons.items())]
    return "\n".join(lines) + "\n"


def _cell(verdict: Verdict, reasons: dict[str, int]) -> str:
    if not verdict.verdict:
        return "–"
    if not verdict.detail:
        return verdict.verdict
    return f"{verdict.verdict}[^{_number(reasons, verdict.detail)}]"


def _number(reasons: dict[str, int], reason: str) -> int:
    reason = reason.replace("|", "\\|")
    return reasons.setdefault(reason, len(reasons) + 1)
