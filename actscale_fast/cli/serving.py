"""`actscale-fast serving`: shows and changes the folder of interventions that a vLLM server follows."""

from __future__ import annotations

import argparse
import json
import os
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from .._json import shown
from .._tables import ranges
from ..interventions import load_intervention
from ..interventions.description import read_description
from ..interventions.named import add_named, checked_name, remove_named, saved_names
from .output import print_table, say

_ROUTE = "/v1/actscale/interventions"
_PATIENCE = 10.0  # seconds for an answer of the server


def serving(options: argparse.Namespace) -> int:
    """Run one of the commands list, add and remove."""
    run = {"list": _list, "add": _add, "remove": _remove}[options.action]
    return run(options)


def _list(options: argparse.Namespace) -> int:
    if options.url is not None:
        return _list_server(options)
    root = _root(options)
    rows, refused = [], {}
    for name in saved_names(root):
        try:
            rows.append(_row(root, name))
        except (ValueError, OSError, ImportError) as error:
            refused[name] = str(error)
    _print(f"Interventions in {root}", rows, refused)
    options.result = {"folder": str(root), "interventions": rows, "refused": refused}
    return 1 if refused else 0


def _list_server(options: argparse.Namespace) -> int:
    answer = _asked(options.url)
    rows, refused = answer["data"], answer["refused"]
    _print(f"Interventions served at {options.url}", rows, refused)
    for number, worker in enumerate(answer["workers"]):
        say(f"worker {number}: " + ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in worker.items()))
    options.result = {"url": options.url, "interventions": rows, "refused": refused, "workers": answer["workers"]}
    return 1 if refused else 0


def _add(options: argparse.Namespace) -> int:
    root, saved = _root(options), Path(options.saved)
    name = checked_name(options.name or saved.resolve().name)
    there = name in (saved_names(root) if root.is_dir() else [])
    digest = add_named(root, name, saved, replace=options.replace)
    if options.url is not None:
        try:
            _asked(options.url, name)
        except (ValueError, OSError):
            # What was replaced cannot be restored: the server refuses the name until it is replaced again.
            if not there:
                remove_named(root, name)
            raise
    say(f"{'replaced' if there else 'added'} {name!r} in {root}")
    options.result = {"folder": str(root), "name": name, "digest": digest, "replaced": there}
    return 0


def _remove(options: argparse.Namespace) -> int:
    root = _root(options)
    remove_named(root, options.name)
    say(f"removed {options.name!r} from {root}")
    options.result = {"folder": str(root), "name": options.name}
    return 0


def _root(options: argparse.Namespace) -> Path:
    given = options.interventions or os.environ.get("ACTSCALE_INTERVENTIONS")
    if not given:
        raise ValueError("interventions: no folder was given, and ACTSCALE_INTERVENTIONS is not set")
    return Path(given)


def _row(root: Path, name: str) -> dict[str, Any]:
    intervention = load_intervention(root / name)
    parts = intervention.singles
    return {
        "name": name,
        "kind": " + ".join(dict.fromkeys(type(part).__name__ for part in parts)),
        "layers": sorted({layer for part in parts for layer in part.location.layers}),
        "active": intervention.n_active,
        "tokens": " + ".join(dict.fromkeys(part.location.tokens for part in parts)),
        "digest": read_description(root / name).sha256,
    }


def _print(title: str, rows: list[dict[str, Any]], refused: dict[str, str]) -> None:
    columns = list(rows[0]) if rows else ["name"]
    print_table(title, columns, [[_cell(key, row.get(key, "")) for key in columns] for row in rows], right=False)
    for name, reason in refused.items():
        say(f"refused: {name!r}: {reason}")


def _cell(key: str, value: Any) -> str:
    if key == "layers" and isinstance(value, list):
        return ranges(value)
    return str(value)[:12] if key == "digest" else str(value)


def _asked(url: str, name: str | None = None) -> dict[str, Any]:
    """The server's answer about all interventions, or about one.

    Raises:
        ValueError: not an HTTP address, or the server refuses the intervention, with its reason.
        OSError: there is no answer.
    """
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise ValueError(f"url: got {shown(url)}, expected an address that begins with http:// or https://")
    address = url.rstrip("/") + _ROUTE + ("" if name is None else f"/{name}")
    key = os.environ.get("VLLM_API_KEY")
    request = urllib.request.Request(address, headers={"Authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.urlopen(request, timeout=_PATIENCE) as answer:
            return json.load(answer)  # type: ignore[no-any-return]
    except urllib.error.HTTPError as error:
        raise ValueError(f"url: {address} answers {error.code}: {_reason(error)}") from None
    except urllib.error.URLError as error:
        raise ConnectionError(f"url: {address} does not answer ({error.reason})") from None


def _reason(error: urllib.error.HTTPError) -> str:
    raw = error.read(1 << 16).decode(errors="replace")
    try:
        content = json.loads(raw)
        told = content.get("detail") or content["error"]
        reason = str(told["message"] if isinstance(told, dict) else told)
    except (ValueError, AttributeError, KeyError, TypeError):
        reason = " ".join(raw.split())[:300]
    # The web framework's own words: there is no such route.
    return f"{reason}; was the server started with VLLM_PLUGINS=actscale?" if reason == "Not Found" else reason
