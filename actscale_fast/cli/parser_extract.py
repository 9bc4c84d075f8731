"""The options of the commands that take vectors from activations and combine interventions."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from . import options
from .values import layer_list, position_list, positive_float, positive_int, strength_list

Make = Callable[..., argparse.ArgumentParser]


def extract(command: argparse.ArgumentParser, make: Make) -> None:
    """The recipes, each a command of its own."""
    command.description = "Takes steering vectors from the model's own activations, without training, and saves them."
    recipes = command.add_subparsers(dest="recipe", required=True, metavar="RECIPE", title="recipes")
    out = "--out FOLDER [options]"
    files = f"--target FILE --training FILE --layers LIST {out}"
    for name, usage, what, add in (
        ("act-add", f"--positive TEXT --layer N {out}", "the difference between two prompts (ActAdd)", _act_add),
        ("mean-centring", files, "the mean over some texts minus the mean over others", _mean_centring),
        ("instruction", f"--data FILE --layer N {out}", "what an instruction adds to a prompt", _instruction),
        ("latent", f"--sentence TEXT --layer N {out}", "a vector that makes the model say a sentence", _latent),
    ):
        recipe = make(recipes, name, usage, what)
        options.model(recipe, shared=True)
        options.paths(recipe)
        options.out(recipe, "the intervention")
        add(recipe)


def _act_add(command: argparse.ArgumentParser) -> None:
    command.add_argument("--positive", required=True, metavar="TEXT", help="the prompt to steer towards, such as Love")
    command.add_argument("--negative", default="", metavar="TEXT", help="the prompt to steer away from, such as Hate")
    command.add_argument(
        "--layer", type=int, required=True, metavar="N", help="the layer whose input is changed, from 1 on"
    )
    options.number(command, "--coefficient", float, 1.0, "factor on the difference", "X")


def _mean_centring(command: argparse.ArgumentParser) -> None:
    command.add_argument("--target", required=True, metavar="FILE", help="texts to steer towards, one per line")
    command.add_argument("--training", required=True, metavar="FILE", help="ordinary texts, one per line")
    command.add_argument("--layers", type=layer_list, required=True, metavar="LIST", help="layer numbers, such as 12")
    options.site(command, "residual")
    options.number(command, "--coefficient", float, 1.0, "factor on the difference", "X")
    where = command.add_mutually_exclusive_group()
    where.add_argument(
        "--positions", type=position_list, default=[-1], metavar="LIST",
        help="positions of tokens in the prompt; generated tokens are always steered (default: the last one)",
    )  # fmt: skip
    where.add_argument("--every-token", action="store_true", help="steer every token instead")
    options.number(
        command, "--skip", int, 0, "leave out the first N tokens of each text; use 1 if the first activation is huge"
    )


def _instruction(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--data", required=True, metavar="FILE", help='JSONL file; each line is {"with": "prompt", "without": "prompt"}'
    )
    _layer(command)
    options.choice(
        command, "--mode", ("projection", "add"),
        "projection: set the component along the direction to its mean under the instruction; "
        "add: add --coefficient times the direction", "KIND",
    )  # fmt: skip
    command.add_argument("--coefficient", type=positive_float, metavar="X", help="factor, required with --mode add")


def _latent(command: argparse.ArgumentParser) -> None:
    command.add_argument("--sentence", required=True, metavar="TEXT", help="the sentence that the model is to say")
    _layer(command)
    command.add_argument("--steps", type=positive_int, metavar="N", help="maximum number of updates")
    options.seed(command, what="random seed of the restarts")


def _layer(command: argparse.ArgumentParser) -> None:
    command.add_argument("--layer", type=int, required=True, metavar="N", help="layer number, negative from the last")


def combine(command: argparse.ArgumentParser) -> None:
    command.description = "Adds interventions, each times a factor: 'combine A B --factors 0.5,1' is 0.5·A + B."
    command.add_argument("parts", nargs="+", metavar="FOLDER", help="folders of saved interventions")
    command.add_argument("--factors", type=strength_list, metavar="LIST", help="one number each (default: all 1)")
    options.out(command, "the sum")
