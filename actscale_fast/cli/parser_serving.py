"""The options of `actscale-fast serving`."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from . import options

Make = Callable[..., argparse.ArgumentParser]


def serving(command: argparse.ArgumentParser, make: Make) -> None:
    """The commands that show and change a folder of interventions."""
    command.description = (
        "Shows and changes the folder of interventions that a vLLM server with this package's plug-in follows. A\n"
        "change takes effect with the next request; requests that are running keep what they began with."
    )
    actions = command.add_subparsers(
        dest="action", required=True, metavar="COMMAND", title="commands", help="what to do with the folder"
    )
    shown = make(actions, "list", "[options]", "list the interventions that requests can name")
    _where(shown)
    added = make(actions, "add", "SAVED [--name NAME] [options]", "add a saved intervention, or replace one")
    added.add_argument("saved", metavar="SAVED", help=options.SAVED)
    added.add_argument("--name", metavar="NAME", help="the name for requests (default: that of the folder)")
    added.add_argument("--replace", action="store_true", help="replace the intervention of that name")
    _where(added)
    removed = make(actions, "remove", "NAME [options]", "remove an intervention")
    removed.add_argument("name", metavar="NAME", help="the name that requests give")
    _where(removed)


def _where(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--interventions", metavar="FOLDER",
        help="the folder that the server follows (default: $ACTSCALE_INTERVENTIONS)",
    )  # fmt: skip
    command.add_argument(
        "--url", metavar="URL",
        help="also ask the running server, such as http://localhost:8000, which must have been started with\n"
        "VLLM_PLUGINS=actscale; the key is taken from $VLLM_API_KEY",
    )  # fmt: skip
    options.as_json(command)
