"""Records as small JSON files, one a case and machine, and the Markdown tables made from them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from actscale_fast._files import atomic_path

FOLDER = Path(__file__).resolve().parent / "results"
UNITS = {"s": 1.0, "ms": 1e3, "us": 1e6}


def save(record: dict[str, Any], folder: Path = FOLDER) -> Path:
    """Write a record as <case>-<machine>.json, whole or not at all; figures keep four digits."""
    path = folder / f"{record['case']}-{record['machine']}.json"
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(_shortened(record), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def load_all(folder: Path = FOLDER) -> list[dict[str, Any]]:
    """Every record of the folder, by case and machine.

    Raises:
        ValueError: a file that is not a record, by name.
    """
    records = []
    for path in sorted(folder.glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            records.append((record["case"], record["machine"], record))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not a benchmark record ({error})") from None
    return [record for _, _, record in sorted(records, key=lambda entry: entry[:2])]


def _shortened(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _shortened(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_shortened(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    return value


def table(record: dict[str, Any]) -> str:
    """The record as Markdown: a line of provenance, and a row for each setting and variant."""
    environment = record["environment"]
    threads = f"{environment['threads']} thread" + "s" * (environment["threads"] > 1)
    where = environment["gpu"] or f"{environment['cpu']}, {threads}, {environment['kernel_level']}"
    versions = environment["versions"]
    origin = f"{where}; torch {versions['torch']}; {environment['date']}; commit {environment['commit'] or 'unknown'}"
    if record["quick"]:
        origin += "; quick run"
    columns = ["", "variant", f"{record['unit']} (20–80 %)"]
    columns += ["GB/s", "% of copy"] if record["bandwidth"] else []
    columns += ["× eager", "× compile", "peak MB"]
    columns += ["kernels", "MB moved"] if record.get("counted") else []
    lines = [f"**{record['title']}** ({origin})", "", _row(columns), _row(["---"] * len(columns))]
    notes: list[str] = []
    for setting in record["settings"]:
        label = setting["label"]
        if setting["note"] and setting["note"] not in notes:
            notes.append(setting["note"])
        label += f" [{notes.index(setting['note']) + 1}]" if setting["note"] else ""
        clocks = sorted(
            {clock for entry in setting["variants"] for clock in entry.get("seconds", {})}, key=_clock_order
        )
        for entry in setting["variants"]:
            for clock in clocks if "seconds" in entry else [""]:
                name = entry["name"] + (f", {clock}" if len(clocks) > 1 else "")
                lines.append(_row([label, name, *_figures(entry, clock, setting, record)]))
                label = ""
    lines += [line for number, note in enumerate(notes, start=1) for line in ("", f"[{number}] {note}")]
    return "\n".join(lines)


def _figures(entry: dict[str, Any], clock: str, setting: dict[str, Any], record: dict[str, Any]) -> Iterable[str]:
    counted = record.get("counted", False)
    width = 4 + 2 * record["bandwidth"] + 2 * counted
    if "seconds" not in entry:
        return [f"not timed: {entry['status']}"] + [""] * (width - 1)
    times, unit = entry["seconds"][clock], UNITS[record["unit"]]
    shown = [f"{times['median'] * unit:.3g} ({times['low'] * unit:.3g}–{times['high'] * unit:.3g})"]
    if clock != setting["clock"]:
        return shown + [""] * (width - 1)
    if record["bandwidth"]:
        share = entry.get("share_of_copy")
        shown += [f"{entry['gb_per_s']:.3g}", "" if share is None else f"{100 * share:.0f}"]
    for key in ("times_eager", "times_compile"):
        shown.append(f"{entry[key]:.2f}" if key in entry else "")
    shown.append(f"{entry['peak_bytes'] / 1e6:.3g}" if "peak_bytes" in entry else "")
    if counted:
        shown += [str(entry.get("kernels", "")), f"{entry['moved_bytes'] / 1e6:.3g}" if "moved_bytes" in entry else ""]
    return shown


def _clock_order(clock: str) -> int:
    return ("device", "call", "step").index(clock)


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def markers(name: str) -> tuple[str, str]:
    """The comments between which the tables of `name` ("all", or a case) stand in a Markdown file."""
    return f"<!-- benchmarks:{name} -->", f"<!-- /benchmarks:{name} -->"


def fill(document: Path, records: list[dict[str, Any]]) -> bool:
    """Put the tables between the markers of a Markdown file; True where that changed it.

    Raises:
        ValueError: an opening marker without its closing one.
    """
    text = filled = document.read_text(encoding="utf-8")
    for name in ("all", *dict.fromkeys(record["case"] for record in records)):
        opening, closing = markers(name)
        if opening not in filled:
            continue
        head, rest = filled.split(opening, 1)
        if closing not in rest:
            raise ValueError(f"{document}: {opening} without {closing}")
        chosen = [table(record) for record in records if name in ("all", record["case"])]
        filled = head + opening + "\n" + "\n\n".join(chosen) + "\n" + closing + rest.split(closing, 1)[1]
    if filled != text:
        with atomic_path(document) as temporary:
            temporary.write_text(filled, encoding="utf-8")
    return filled != text
