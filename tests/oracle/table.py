"""The table of architectures: `python -m tests.oracle.table --markdown docs/models.md`.

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
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .checks import check
from .page import markdown, summary
from .verdicts import CRASH, WRONG, Row

SECONDS = 180.0
BYTES = 10 << 30


def architectures() -> dict[str, str]:
    """Model type -> class, of every causal language model that the installed transformers has."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from .overrides import MORE

    return {**MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, **MORE}


def run(names: Iterable[tuple[str, str]], *, keep: Path | None = None) -> list[Row]:
    """The rows of these architectures, one process after the other; `keep` is written after each."""
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
        if keep is not None:
            keep.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
        words = {site: str(verdict)[:60] for site, verdict in row.sites.items()}
        line = f"{model_type:28} {time.perf_counter() - begun:4.1f} s  {row.made[:90] or words}"
        print(f"{line} generate={str(row.generate)[:60]} fit={str(row.fit)[:60]}", file=sys.stderr, flush=True)
    return rows


def _work(model_type: str, name: str, sender: Any) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    warnings.simplefilter("ignore")
    try:
        sender.send(check(model_type, name))
    except BaseException as error:
        sender.send(Row(model_type, name, made=f"{type(error).__name__}: {error}"))
        raise


def main(arguments: list[str] | None = None) -> int:
    """Run the table; the exit status is 1 where something is silently wrong or crashes."""
    parser = argparse.ArgumentParser(prog="python -m tests.oracle.table", description=__doc__)
    parser.add_argument("--only", help="model types, separated by commas")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    options = parser.parse_args(arguments)
    chosen = architectures()
    if options.only:
        chosen = {name: chosen[name] for name in options.only.split(",")}
    _import_before_forking()
    rows = run(chosen.items(), keep=options.json)
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
