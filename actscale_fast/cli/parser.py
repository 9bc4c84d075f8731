"""Commands and their options. Nothing heavy is imported here: `--help` answers at once."""

from __future__ import annotations

import argparse
import functools

from .. import defaults
from . import options, parser_extract, parser_learning
from .values import positive_int, strength_list


class _Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=110)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; `command` names the chosen command."""
    parser = argparse.ArgumentParser(
        prog="actscale-fast",
        formatter_class=_Help,
        description="Learn and apply signed scalars on the activations of a frozen language model.",
        epilog="Start with:  actscale-fast demo\n\n"
        "Exit status: 0 done; 1 failed, with one line that says why; 2 wrong usage; 130 interrupted.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    _demo(_command(commands, "demo", "[options]", "learn scalars on a small real model, and see that they work"))
    learned = "(--data FILE | --task TASK) --out FOLDER [options]"
    parser_learning.fit(_command(commands, "fit", learned, "learn an intervention from examples"))
    parser_learning.sweep(_command(commands, "sweep", learned, "fit many interventions at once, and compare them"))
    parser_learning.attribution(
        _command(commands, "attribution", learned, "find what each head contributes to the answers")
    )
    pairs = "(--data FILE | --task TASK) --layers LIST --out FOLDER [options]"
    parser_learning.interchange(_command(commands, "interchange", pairs, "learn where a variable of a task is kept"))
    parser_extract.extract(
        _command(commands, "extract", "RECIPE [options]", "take steering vectors from activations"),
        functools.partial(_command, before="extract "),
    )
    summed = "FOLDER FOLDER … --out FOLDER [--factors LIST]"
    parser_extract.combine(_command(commands, "combine", summed, "add interventions to one"))
    examples = "--intervention FOLDER (--data FILE | --task TASK) [options]"
    _evaluate(_command(commands, "evaluate", examples, "measure an intervention on examples, beside the frozen model"))
    prompt = "--intervention FOLDER --prompt TEXT [options]"
    _generate(_command(commands, "generate", prompt, "continue a prompt under one or several strengths"))
    picture = "(--intervention FOLDER | --history FILE) --out FILE [options]"
    _plot(_command(commands, "plot", picture, "draw an intervention, or the history of a fit"))
    merged = "--intervention FOLDER --out FOLDER [options]"
    _merge(_command(commands, "merge", merged, "write an intervention into a model's weights and save the model"))
    parser_learning.reproduce(
        _command(commands, "reproduce", "--out FOLDER [options]", "compare all systems on a model, in one report")
    )
    _command(
        commands,
        "bench",
        "[-- ARGUMENTS]",
        "run the benchmarks of a source checkout",
        "Runs `python -m benchmarks` in the checkout; every further argument is handed to it, for example\n"
        "  actscale-fast bench -- --help",
    )
    return parser


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    usage: str,
    short: str,
    more: str = "",
    before: str = "",
) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name,
        usage=f"actscale-fast {before}{name} {usage}",
        help=short,
        description=f"{short[0].upper()}{short[1:]}.\n{more}".strip(),
        formatter_class=_Help,
        allow_abbrev=False,
    )
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return command


def _demo(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Builds country-capital conflicts (a prompt that claims a false capital), learns one scalar per attention\n"
        "head that flips the model between what it remembers and what it was told, measures them on countries that\n"
        "training never saw, saves them with a heat map, and continues one prompt under three strengths."
    )
    options.model(command)
    command.add_argument("--out", default="actscale-demo", metavar="FOLDER", help="results (default: ./actscale-demo)")
    command.add_argument("--steps", type=positive_int, default=defaults.STEPS, metavar="N", help="default: %(default)s")
    command.add_argument("--seed", type=int, default=defaults.SEED, metavar="N", help="default: %(default)s")


def _evaluate(command: argparse.ArgumentParser) -> None:
    options.intervention(command)
    options.model(command)
    options.data(command)
    command.add_argument(
        "--seed", type=int, metavar="N", help=f"of the task (default: that of the fit, else {defaults.SEED})"
    )
    command.add_argument("--batch-size", type=positive_int, default=32, metavar="N", help="default: %(default)s")
    command.add_argument("--out", metavar="FILE", help="also write the figures as JSON")


def _generate(command: argparse.ArgumentParser) -> None:
    options.intervention(command)
    options.model(command)
    command.add_argument(
        "--prompt", required=True, action="append", metavar="TEXT", help="the text to continue; may be repeated"
    )
    command.add_argument(
        "--source", action="append", metavar="TEXT", help="of an interchange: the other input, one for each prompt"
    )
    command.add_argument(
        "--strength",
        type=strength_list,
        action="append",
        metavar="LIST",
        help="one or several, such as -1,0,1; may be repeated (default: -1,0,1)",
    )
    command.add_argument("--max-new-tokens", type=positive_int, default=20, metavar="N", help="default: %(default)s")
    command.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")


def _plot(command: argparse.ArgumentParser) -> None:
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument("--intervention", metavar="FOLDER", help="draw its scalars as a signed heat map")
    source.add_argument(
        "--history", metavar="FILE", help="draw the terms over the steps, from the history.json of a fit"
    )
    command.add_argument("--out", required=True, metavar="FILE", help="the picture: .png, .pdf or .svg")
    command.add_argument("--title", metavar="TEXT", help="above the picture")


def _merge(command: argparse.ArgumentParser) -> None:
    options.intervention(command)
    options.model(command)
    command.add_argument("--strength", type=float, default=1.0, metavar="X", help="default: %(default)s")
    command.add_argument("--out", required=True, metavar="FOLDER", help="where model and tokenizer are saved")
