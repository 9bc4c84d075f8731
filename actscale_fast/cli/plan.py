"""`actscale-fast plan`: the memory of a fit, from a model's config."""

from __future__ import annotations

import argparse

from ..learning.memory_plan import plan_memory
from .output import print_table, say


def plan(options: argparse.Namespace) -> int:
    """Print the bytes on each device and what to set; with --json, one object of the same content."""
    found = plan_memory(
        options.model,
        options.tokens,
        batch_size=options.batch_size,
        accumulate=options.accumulate,
        n_examples=options.n_examples,
        dtype=options.dtype,
        site=options.site,
        layers=options.layers,
        tp=options.tp,
        fsdp=options.fsdp,
        memory_gb=options.memory,
    )
    columns, rows = found.table()
    print_table(found._heading(), columns, rows)
    for line in found.advice:
        say(line)
    options.result = found.to_dict()
    return 0
