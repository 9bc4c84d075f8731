"""The table of architectures: `python -m tests.architectures.table [--only bart,gemma4] [--json FILE] [--markdown FILE]`.

Each architecture runs in a process of its own with a time and a memory limit, so that a crash is one row.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .checks import CANNOT_ACT, CRASH, REFUSED, RIGHT, SITES, UNCHECKED, WRONG, Row, Verdict, check

SECONDS = 60.0
BYTES = 10 << 30


def architectures() -> dict[str, str]:
    """Model type -> class, of every causal language model that the installed transformers has."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from .overrides import MORE

    return {**MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, **MORE}


def run(names: Iterable[tuple[str, str]], *, progress: bool = True) -> list[Row]:
    """The rows of these architectures, one process after the other."""
    context = multiprocessing.get_context("fork")  # the libraries are imported once
    rows = []
    for model_type, name in names:
        begun = time.perf_counter()
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(model_type, name, sender))
        process.start()
        sender.close()
        row = Row(model_type, name, made="no answer")
        if receiver.poll(SECONDS):
            try:
                row = receiver.recv()
            except EOFError:
                row.made = "the process died"
        else:
            row.made = f"no result within {SECONDS:.0f} s"
        if process.is_alive():
            process.join(5)
            process.kill()
        process.join()
        rows.append(row)
        if progress:
            words = {site: str(verdict)[:60] for site, verdict in row.sites.items()}
            print(f"{model_type:28} {time.perf_counter() - begun:4.1f} s  {row.made[:90] or words}"
                  f" generate={str(row.generate)[:60]} fit={str(row.fit)[:60]}", file=sys.stderr, flush=True)  # fmt: skip
    return rows


def _work(model_type: str, name: str, sender: Any) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    warnings.simplefilter("ignore")
    try:
        sender.send(check(model_type, name))
    except BaseException as error:
        sender.send(Row(model_type, name, made=f"{type(error).__name__}: {error}"))
        raise


def summary(rows: list[Row]) -> dict[str, int]:
    """How many architectures there are of each kind."""
    ran = [row for row in rows if not row.made]
    count = Counter(verdict.verdict for row in ran for verdict in row.verdicts)
    return {
        "architectures": len(rows),
        "ran": len(ran),
        "right at the head site or at a whole site": sum(any(v.verdict == RIGHT for v in row.sites.values()) for row in ran),
        "right at the head site": sum(row.sites["head"].verdict == RIGHT for row in ran),
        "right in fit": sum(row.fit.verdict == RIGHT for row in ran),
        "right in cached generation": sum(row.generate.verdict == RIGHT for row in ran),
        "silently wrong": count[WRONG],
        "unnamed errors": count[CRASH],
        "accepted without an oracle": count[UNCHECKED],
        "refusals": count[REFUSED],
        "sites that cannot act": count[CANNOT_ACT],
    }  # fmt: skip


def markdown(rows: list[Row]) -> str:
    """The table for the documentation."""
    import torch
    import transformers

    lines = [
        "# Models",
        "",
        "What this package does on every causal language model of transformers, at a tiny random size, compared with an "
        "oracle that shares no code with it. `python -m tests.architectures.table --markdown docs/models.md` writes this "
        f"page; it was last written with transformers {transformers.__version__} and PyTorch {torch.__version__}.",
        "",
        "- **right**: the same logits as plain hooks (whole sites) or as heads scaled where transformers' attention "
        "function returns them, to 1e-6 of the effect in float64.",
        "- **cannot act**: right, but a norm follows, so that only a factor's sign gets through.",
        "- **refused**: the call raises an error that says why; the reasons are listed below the table.",
        "- **generate**: cached generation with positions under left padding has the logits of whole passes, one prompt "
        "at a time. **fit**: the terms and their gradient are those of whole passes, one prompt at a time.",
        "",
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


def main(arguments: list[str] | None = None) -> int:
    """Run the table; the exit status is 1 where something is silently wrong or crashes."""
    parser = argparse.ArgumentParser(prog="python -m tests.architectures.table", description=__doc__)
    parser.add_argument("--only", help="model types, separated by commas")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    options = parser.parse_args(arguments)
    chosen = architectures()
    if options.only:
        chosen = {name: chosen[name] for name in options.only.split(",")}
    _import_before_forking()
    rows = run(chosen.items())
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    if options.markdown:
        options.markdown.write_text(markdown(rows))
    for name, count in summary(rows).items():
        print(f"{count:5}  {name}")
    return int(any(verdict.verdict in (WRONG, CRASH) for row in rows for verdict in row.verdicts))


def _import_before_forking() -> None:
    """Import what every process needs, on one thread, which a fork keeps intact."""
    import torch
    import transformers.generation
    from transformers.utils import logging

    import actscale_fast as af

    from .objective import tokenizer

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer()
    _ = (transformers.generation.GenerationMixin, af.fit, af.patch, af.ActivScalar)


if __name__ == "__main__":
    sys.exit(main())
