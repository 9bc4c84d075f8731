"""The options of the commands that take vectors from activations, and put interventions together."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from . import options
from .values import layer_list, position_list, positive_float, positive_int, strength_list

Make = Callable[..., argparse.ArgumentParser]


def extract(command: argparse.ArgumentParser, make: Make) -> None:
    """The recipes, each a command of its own."""
    command.description = "Takes steering vectors from the model's own activations, and saves them."
    recipes = command.add_subparsers(dest="recipe", required=True, metavar="RECIPE", title="recipes")
    out = "--out FOLDER [options]"
    _act_add(make(recipes, "act-add", f"--positive TEXT --layer N {out}", "the difference of two prompts (ActAdd)"))
    files = f"--target FILE --training FILE --layers LIST {out}"
    _mean_centring(make(recipes, "mean-centring", files, "the mean of some texts less that of others"))
    pairs = f"--data FILE --layer N {out}"
    _instruction(make(recipes, "instruction", pairs, "what an instruction adds to a prompt"))
    _latent(make(recipes, "latent", f"--sentence TEXT --layer N {out}", "a vector that makes the model say a sentence"))


def _act_add(command: argparse.ArgumentParser) -> None:
    options.model(command)
    options.paths(command)
    _out(command)
    command.add_argument("--positive", required=True, metavar="TEXT", help="the prompt to steer to, such as Love")
    command.add_argument("--negative", default="", metavar="TEXT", help="the prompt to steer from, such as Hate")
    command.add_argument("--layer", type=int, required=True, metavar="N", help="whose input is changed, from 1")
    command.add_argument("--coefficient", type=float, default=1.0, metavar="X", help="default: %(default)s")


def _mean_centring(command: argparse.ArgumentParser) -> None:
    options.model(command)
    options.paths(command)
    _out(command)
    command.add_argument("--target", required=True, metavar="FILE", help="texts to steer to, one a line")
    command.add_argument("--training", required=True, metavar="FILE", help="ordinary texts, one a line")
    command.add_argument("--layers", type=layer_list, required=True, metavar="LIST", help="such as 12")
    command.add_argument("--site", choices=options.SITES, default="residual", metavar="SITE", help="default: residual")
    command.add_argument("--coefficient", type=float, default=1.0, metavar="X", help="default: %(default)s")
    where = command.add_mutually_exclusive_group()
    where.add_argument(
        "--positions", type=position_list, default=[-1], metavar="LIST",
        help="tokens of the prompt, and all generated ones (default: the last)",
    )  # fmt: skip
    where.add_argument("--every-token", action="store_true", help="steer every token instead")
    command.add_argument(
        "--skip", type=int, default=0, metavar="N",
        help="leave out each text's first N tokens: 1 where the first's activation is huge (default: %(default)s)",
    )  # fmt: skip


def _instruction(command: argparse.ArgumentParser) -> None:
    options.model(command)
    options.paths(command)
    _out(command)
    command.add_argument(
        "--data", required=True, metavar="FILE", help='JSONL file, a line: {"with": prompt, "without": prompt}'
    )
    command.add_argument("--layer", type=int, required=True, metavar="N", help="negative from the last")
    command.add_argument(
        "--mode", choices=("projection", "add"), default="projection", metavar="KIND",
        help="projection: set to what it is under the instruction; add: --coefficient times the direction",
    )  # fmt: skip
    command.add_argument("--coefficient", type=positive_float, metavar="X", help="of --mode add")


def _latent(command: argparse.ArgumentParser) -> None:
    options.model(command)
    options.paths(command)
    _out(command)
    command.add_argument("--sentence", required=True, metavar="TEXT", help="what the model is to say")
    command.add_argument("--layer", type=int, required=True, metavar="N", help="negative from the last")
    command.add_argument("--steps", type=positive_int, metavar="N", help="updates at most")


def combine(command: argparse.ArgumentParser) -> None:
    command.description = "Adds interventions, each times its factor: 0.5·A + B is 'combine A B --factors 0.5,1'."
    command.add_argument("parts", nargs="+", metavar="FOLDER", help="interventions, as other commands saved them")
    command.add_argument("--factors", type=strength_list, metavar="LIST", help="one number each (default: all 1)")
    _out(command)


def _out(command: argparse.ArgumentParser) -> None:
    command.add_argument("--out", required=True, metavar="FOLDER", help="where the intervention is saved")
