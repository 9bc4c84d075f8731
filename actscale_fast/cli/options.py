"""Options that several commands share. Nothing heavy is imported here."""

from __future__ import annotations

import argparse
from typing import Any

from .. import defaults
from .settings import DEMO
from .values import positive_int

DEMO_MODEL = "SmolLM2-135M-Instruct, fetched from the Python package index once"
SITES = ("head", "attn_out", "mlp_out", "residual")
KINDS = ("activ-scalar", "steer-vec", "dyn-scalar")
TASKS = ("country-capital", "indirect-object", "greater-than", "name-order", "price-tagging")
_DTYPES = ("auto", "float32", "bfloat16", "float16")


def steps(command: argparse.ArgumentParser) -> argparse._ArgumentGroup:
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


def intervention(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--intervention", required=True, metavar="FOLDER", help="as saved by demo, fit, interchange, extract or combine"
    )


def data(command: argparse.ArgumentParser) -> None:
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--data", metavar="FILE", help='JSONL file, a line: {"prompt": …, "correct": " Berlin", "wrong": " Paris"}'
    )
    source.add_argument(
        "--task",
        choices=TASKS,
        metavar="TASK",
        help=", ".join(TASKS) + " (the last two are of pairs, for interchange)",
    )
    command.add_argument(
        "--aligned", action="store_true", help="of a task: prompts whose tokens stand at the same positions"
    )
    command.add_argument(
        "--split", choices=("country", "template", "both"), metavar="WHAT",
        help="of country-capital, what is held out: country, template or both (default: country)",
    )  # fmt: skip
    command.add_argument(
        "--n-train", type=positive_int, default=DEMO.n_train, metavar="N", help="of a task (default: %(default)s)"
    )
    command.add_argument(
        "--n-test", type=positive_int, default=DEMO.n_test, metavar="N", help="of a task (default: %(default)s)"
    )


def model(command: argparse.ArgumentParser) -> None:
    model = command.add_argument_group("the model")
    model.add_argument(
        "--model", metavar="NAME_OR_PATH", help=f"of the Hugging Face hub, or a folder (default: {DEMO_MODEL})"
    )
    model.add_argument(
        "--dtype", choices=_DTYPES, default="auto", metavar="TYPE", help=", ".join(_DTYPES) + " (default: as saved)"
    )
    model.add_argument(
        "--device", default="auto", metavar="NAME", help="cpu, cuda, cuda:1, … (default: a GPU where there is one)"
    )
    model.add_argument("--threads", type=positive_int, metavar="N", help="processor threads (default: torch's choice)")


def paths(command: argparse.ArgumentParser) -> None:
    """Module paths for a model whose parts cannot be told apart; saved interventions keep theirs."""
    group = command.add_argument_group("parts of a model of an unlisted family, where they cannot be told apart")
    group.add_argument(
        "--layers-path", metavar="PATH", help="path of the list of layers in the model, such as model.layers"
    )
    group.add_argument(
        "--projection",
        metavar="PATH",
        help="path of attention's output projection in a layer, such as self_attn.o_proj",
    )
    group.add_argument("--mlp", metavar="PATH", help="path of the MLP in a layer, such as mlp")


def given_paths(parsed: argparse.Namespace) -> dict[str, Any]:
    """The module paths that were given, as `for_model(**...)` and `paths=` take them."""
    found = {name: getattr(parsed, name, None) for name in ("layers_path", "projection", "mlp")}
    return {name: path for name, path in found.items() if path is not None}
