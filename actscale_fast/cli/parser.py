"""Commands and their options. Nothing heavy is imported here: `--help` answers at once."""

from __future__ import annotations

import argparse

from .. import defaults
from .settings import DEMO
from .values import (
    layer_list,
    position_list,
    positive_float,
    positive_int,
    rate_list,
    seed_list,
    strength_list,
    weight,
    weight_list,
)

_DEMO_MODEL = "SmolLM2-135M-Instruct, fetched from the Python package index once"
_SITES = ("head", "attn_out", "mlp_out", "residual")
_DTYPES = ("auto", "float32", "bfloat16", "float16")


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
    _fit(_command(commands, "fit", learned, "learn an intervention from examples"))
    _sweep(_command(commands, "sweep", learned, "fit many interventions at once, and compare them"))
    _attribution(_command(commands, "attribution", learned, "find what each head contributes to the answers"))
    examples = "--intervention FOLDER (--data FILE | --task TASK) [options]"
    _evaluate(_command(commands, "evaluate", examples, "measure an intervention on examples, beside the frozen model"))
    prompt = "--intervention FOLDER --prompt TEXT [options]"
    _generate(_command(commands, "generate", prompt, "continue a prompt under one or several strengths"))
    picture = "(--intervention FOLDER | --history FILE) --out FILE [options]"
    _plot(_command(commands, "plot", picture, "draw an intervention, or the history of a fit"))
    merged = "--intervention FOLDER --out FOLDER [options]"
    _merge(_command(commands, "merge", merged, "write an intervention into a model's weights and save the model"))
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
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, usage: str, short: str, more: str = ""
) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name,
        usage=f"actscale-fast {name} {usage}",
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
    _model(command)
    command.add_argument("--out", default="actscale-demo", metavar="FOLDER", help="results (default: ./actscale-demo)")
    command.add_argument("--steps", type=positive_int, default=defaults.STEPS, metavar="N", help="default: %(default)s")
    command.add_argument("--seed", type=int, default=defaults.SEED, metavar="N", help="default: %(default)s")


def _fit(command: argparse.ArgumentParser) -> None:
    _model(command)
    _data(command)
    command.add_argument("--test-data", metavar="FILE", help="JSONL file of held-out examples to measure on afterwards")
    command.add_argument("--out", required=True, metavar="FOLDER", help="where the intervention is saved")
    where = command.add_argument_group("where the model is changed")
    where.add_argument(
        "--site", choices=_SITES, default="head", metavar="SITE", help=", ".join(_SITES) + " (default: head)"
    )
    where.add_argument("--layers", type=layer_list, metavar="LIST", help="such as 0,3,10-19,-1 (default: all)")
    where.add_argument(
        "--positions",
        type=position_list,
        metavar="LIST",
        help="tokens of the prompt, such as 0,-1 (default: every token)",
    )
    where.add_argument(
        "--generated",
        action="store_true",
        help="with --positions: a slot for the generated tokens; no example has any, so fit leaves it at 0",
    )
    objective = command.add_argument_group("the objective")
    objective.add_argument(
        "--margin",
        type=weight,
        default=defaults.MARGIN,
        metavar="X",
        help="wanted logit difference (default: %(default)s)",
    )
    objective.add_argument(
        "--faithfulness",
        type=weight,
        default=defaults.FAITHFULNESS,
        metavar="X",
        help="weight of the KL (default: %(default)s)",
    )
    objective.add_argument(
        "--minimality",
        type=weight,
        default=defaults.MINIMALITY,
        metavar="X",
        help="weight of the ℓ1 norm (default: %(default)s)",
    )
    objective.add_argument(
        "--kl",
        choices=("forward", "reverse"),
        default="forward",
        metavar="KIND",
        help="forward or reverse (default: forward)",
    )
    objective.add_argument(
        "--include-answers",
        action="store_true",
        help="let the KL count the two answers (default: the other tokens only)",
    )
    objective.add_argument("--one-direction", action="store_true", help="only towards the correct answer (β = +1)")
    steps = _steps(command)
    steps.add_argument(
        "--lr", type=positive_float, default=defaults.LR, metavar="X", help="learning rate (default: %(default)s)"
    )
    steps.add_argument(
        "--schedule",
        choices=("constant", "linear", "cosine"),
        default=defaults.SCHEDULE,
        metavar="KIND",
        help="fall of the learning rate: constant, linear or cosine (default: cosine)",
    )
    steps.add_argument(
        "--accumulate",
        type=positive_int,
        default=defaults.ACCUMULATE,
        metavar="N",
        help="passes a step (default: %(default)s)",
    )
    steps.add_argument("--seed", type=int, default=defaults.SEED, metavar="N", help="default: %(default)s")
    steps.add_argument(
        "--checkpoint", metavar="FILE", help="kept up to date while fitting; resumed from where it exists"
    )


def _sweep(command: argparse.ArgumentParser) -> None:
    _model(command)
    _data(command)
    command.add_argument("--task-seed", type=int, default=defaults.SEED, metavar="N", help="of a task's examples")
    command.add_argument("--test-data", metavar="FILE", help="JSONL file of held-out examples to measure on afterwards")
    command.add_argument(
        "--out", required=True, metavar="FOLDER", help="one folder a fit; an interrupted sweep goes on"
    )
    command.add_argument("--plot", metavar="FILE", help="the picture of the front (default: front.png in that folder)")
    where = command.add_argument_group("where the model is changed")
    where.add_argument("--site", choices=_SITES, default="head", metavar="SITE", help="default: head")
    where.add_argument("--positions", type=position_list, metavar="LIST", help="tokens of the prompt (default: every)")
    grid = command.add_argument_group("the grid: every combination of these lists is fitted")
    for name, what, default in (
        ("minimality", "weights of the ℓ1 norm", defaults.MINIMALITY),
        ("faithfulness", "weights of the KL", defaults.FAITHFULNESS),
        ("margin", "wanted logit differences", defaults.MARGIN),
    ):
        grid.add_argument(f"--{name}", type=weight_list, metavar="LIST", help=f"{what} (default: {default})")
    grid.add_argument("--lr", type=rate_list, metavar="LIST", help=f"learning rates (default: {defaults.LR})")
    grid.add_argument(
        "--seeds", type=seed_list, default=[defaults.SEED], metavar="LIST", help="such as 0-2 (default: 0)"
    )
    grid.add_argument(
        "--layers", type=layer_list, action="append", metavar="LIST", help="such as 10-19; repeat it for several sets"
    )
    grid.add_argument(
        "--path", type=positive_int, metavar="N", help="N weights of the ℓ1 norm, from the one that keeps all at 0 down"
    )
    grid.add_argument(
        "--warm-start", action="store_true", help="fits that differ in --minimality alone start where the larger ended"
    )
    steps = _steps(command)
    steps.add_argument(
        "--tolerance", type=weight, metavar="X", help="stop a fit whose scalars move by no more than this"
    )


def _steps(command: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """The options of every loop of steps."""
    steps = command.add_argument_group("the steps")
    steps.add_argument("--steps", type=positive_int, default=defaults.STEPS, metavar="N", help="default: %(default)s")
    steps.add_argument(
        "--batch-size", type=positive_int, default=defaults.BATCH_SIZE, metavar="N", help="default: %(default)s"
    )
    steps.add_argument(
        "--checkpoint-every",
        type=positive_int,
        default=defaults.CHECKPOINT_EVERY,
        metavar="N",
        help="steps between two (default: %(default)s)",
    )
    return steps


def _attribution(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Predicts what removing each head would change in the logit difference of the two answers, from one gradient;\n"
        "measures it by removing one at a time; writes both to attribution.json and attribution.png."
    )
    _model(command)
    _data(command)
    command.set_defaults(n_train=32)  # of a task, those that are run: each runs once for every head
    command.add_argument("--seed", type=int, default=defaults.SEED, metavar="N", help="of a task's examples")
    command.add_argument("--out", required=True, metavar="FOLDER", help="where the figures and the picture are written")
    command.add_argument("--site", choices=_SITES, default="head", metavar="SITE", help="default: head")
    command.add_argument("--layers", type=layer_list, metavar="LIST", help="such as 0,3,10-19,-1 (default: all)")
    command.add_argument("--positions", type=position_list, metavar="LIST", help="tokens of the prompt (default: all)")
    command.add_argument("--no-knock-out", action="store_true", help="only predict, which takes seconds")
    command.add_argument(
        "--top", type=positive_int, default=10, metavar="N", help="lines printed (default: %(default)s)"
    )


def _evaluate(command: argparse.ArgumentParser) -> None:
    _intervention(command)
    _model(command)
    _data(command)
    command.add_argument(
        "--seed", type=int, metavar="N", help=f"of the task (default: that of the fit, else {defaults.SEED})"
    )
    command.add_argument("--batch-size", type=positive_int, default=32, metavar="N", help="default: %(default)s")
    command.add_argument("--out", metavar="FILE", help="also write the figures as JSON")


def _generate(command: argparse.ArgumentParser) -> None:
    _intervention(command)
    _model(command)
    command.add_argument("--prompt", required=True, metavar="TEXT", help="the text to continue")
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
    _intervention(command)
    _model(command)
    command.add_argument("--strength", type=float, default=1.0, metavar="X", help="default: %(default)s")
    command.add_argument("--out", required=True, metavar="FOLDER", help="where model and tokenizer are saved")


def _intervention(command: argparse.ArgumentParser) -> None:
    command.add_argument("--intervention", required=True, metavar="FOLDER", help="as saved by fit or demo")


def _data(command: argparse.ArgumentParser) -> None:
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--data", metavar="FILE", help='JSONL file, a line: {"prompt": …, "correct": " Berlin", "wrong": " Paris"}'
    )
    source.add_argument(
        "--task",
        choices=("country-capital", "indirect-object"),
        metavar="TASK",
        help="country-capital or indirect-object",
    )
    command.add_argument(
        "--n-train", type=positive_int, default=DEMO.n_train, metavar="N", help="of a task (default: %(default)s)"
    )
    command.add_argument(
        "--n-test", type=positive_int, default=DEMO.n_test, metavar="N", help="of a task (default: %(default)s)"
    )


def _model(command: argparse.ArgumentParser) -> None:
    model = command.add_argument_group("the model")
    model.add_argument(
        "--model", metavar="NAME_OR_PATH", help=f"of the Hugging Face hub, or a folder (default: {_DEMO_MODEL})"
    )
    model.add_argument(
        "--dtype", choices=_DTYPES, default="auto", metavar="TYPE", help=", ".join(_DTYPES) + " (default: as saved)"
    )
    model.add_argument(
        "--device", default="auto", metavar="NAME", help="cpu, cuda, cuda:1, … (default: a GPU where there is one)"
    )
    model.add_argument("--threads", type=positive_int, metavar="N", help="processor threads (default: torch's choice)")
