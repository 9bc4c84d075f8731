"""`python -m benchmarks [run | list | table]`: see benchmarks/README.md."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from . import cases, results
from .machine import ROOT
from .runner import run_case

PAGES = ("benchmarks/README.md", "docs/fit.md", "docs/integrations.md", "docs/kernels.md", "docs/sweeps.md")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, or 1 where a variant of this package was red."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments.insert(0, "run")
    options = _parser().parse_args(arguments)
    status: int = options.command(options)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks", description="Time the ops and the fit step against PyTorch.")
    commands = parser.add_subparsers(required=True)
    run = commands.add_parser("run", help="check and time cases, print their tables, write their JSON (the default)")
    run.add_argument(
        "--case", nargs="+", choices=list(cases.NAMES), metavar="NAME", help=f"default: {', '.join(cases.DEFAULT)}"
    )
    run.add_argument(
        "--quick", action="store_true", help="fewer settings and samples; writes nothing unless --out is given"
    )
    run.add_argument("--threads", type=_positive, help="CPU threads of PyTorch and of the kernels")
    run.add_argument("--device", choices=["cpu", "cuda"], help="default: the GPU where there is one")
    run.add_argument("--variants", nargs="+", default=[], metavar="NAME", help="only these beside the baseline")
    run.add_argument("--out", type=Path, help=f"folder of the JSON files (default: {results.FOLDER.relative_to(ROOT)})")
    run.set_defaults(command=_run)
    commands.add_parser("list", help="the cases and their settings").set_defaults(command=_list)
    table = commands.add_parser("table", help="write the tables in the documentation from the JSON files")
    table.add_argument("--from", dest="folder", type=Path, default=results.FOLDER, help="folder of the JSON files")
    table.set_defaults(command=_table)
    return parser


def _run(options: argparse.Namespace) -> int:
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        if not torch.cuda.is_available():
            print("benchmarks: --device cuda, but PyTorch finds no GPU here", file=sys.stderr)
            return 2
        device = torch.device("cuda", torch.cuda.current_device())
    red = 0
    for name in options.case or cases.DEFAULT:
        record = run_case(
            cases.load(name), device, quick=options.quick, only=options.variants,
            say=lambda line: print(line, file=sys.stderr, flush=True),
        )  # fmt: skip
        print(results.table(record) + "\n", flush=True)
        if options.out or not options.quick:
            path = results.save(record, options.out or results.FOLDER)
            print(f"wrote {os.path.relpath(path)}", file=sys.stderr)
        red += sum(
            entry["status"].startswith(("wrong", "failed")) and entry["name"].startswith("actscale_fast")
            for setting in record["settings"]
            for entry in setting["variants"]
        )
    return 1 if red else 0


def _list(options: argparse.Namespace) -> int:
    for name in cases.NAMES:
        case = cases.load(name)
        print(f"{name}: {case.title}")
        for setting in case.settings:
            where = "" if len(setting.devices) > 1 else f"  ({setting.devices[0]} alone)"
            print(f"    {setting.label}{'  (quick)' if setting.quick else ''}{where}")
    return 0


def _table(options: argparse.Namespace) -> int:
    try:
        records = results.load_all(options.folder)
        for document in (ROOT / page for page in PAGES):
            if document.is_file():
                changed = results.fill(document, records)
                print(f"{os.path.relpath(document)}: {'tables made anew' if changed else 'nothing to change'}")
    except (OSError, ValueError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    return 0


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {value}, expected at least 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
