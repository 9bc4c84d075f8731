"""Options that several commands share. Nothing heavy is imported here."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any, Literal

from .. import defaults
from .values import column_names, layer_list, position_list, positive_int

DEMO_MODEL = "SmolLM2-135M-Instruct, downloaded once from the Python package index"
MODEL_OF_FIT = "that of the fit, otherwise the demo model"
SHELLS = ("bash", "zsh", "fish")
SITES = ("head", "attn_out", "mlp_out", "residual")
TASKS = (
    "country-capital", "indirect-object", "greater-than", "knowledge-conflict", "name-order", "price-tagging",
)  # fmt: skip
#: The methods of `select_heads`.
HEAD_METHODS = (
    "attribution", "attribution-refit", "knock-out", "knock-out-refit", "activ-scalar", "juice", "juice-once", "sami",
    "sadi", "head-pursuit", "gates", "gates-contrastive", "interchange", "random", "random-refit",
)  # fmt: skip
#: How many examples of a task the commands and the demo use, chosen for SmolLM2-135M-Instruct on two cores.
N_TRAIN, N_TEST = 192, 96
QUANTIZERS = ("bnb-8bit", "bnb-4bit", "torchao-int8", "torchao-fp8", "quanto-int8", "quanto-int4")
DTYPES = ("auto", "float32", "bfloat16", "float16")


def number(
    group: argparse._ActionsContainer,
    name: str,
    kind: Callable[[str], Any],
    default: Any,
    what: str,
    metavar: str = "N",
) -> None:
    """An option with a value, whose help ends with the default."""
    group.add_argument(name, type=kind, default=default, metavar=metavar, help=f"{what} (default: {default})")


def choice(group: argparse._ActionsContainer, name: str, choices: Sequence[str], what: str, metavar: str) -> None:
    """An option with a few values, the first of which is the default."""
    group.add_argument(
        name, choices=choices, default=choices[0], metavar=metavar, help=f"{what} (default: {choices[0]})"
    )


def seed(command: argparse._ActionsContainer, name: str = "--seed", what: str = "random seed") -> None:
    number(command, name, int, defaults.SEED, what)


def as_json(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--json", action="store_true", help="print the result as one JSON document on stdout, and all else on stderr"
    )


def out(command: argparse.ArgumentParser, what: str) -> None:
    command.add_argument("--out", required=True, metavar="FOLDER", help=f"output folder for {what}")


#: `Execution.recompute` by the value of --recompute; the first is the default.
RECOMPUTE: dict[str, bool | Literal["auto"]] = {"auto": "auto", "always": True, "never": False}


def test_data(command: argparse.ArgumentParser) -> None:
    command.add_argument("--test-data", metavar="FILE", help="file of held-out examples; they are evaluated at the end")


def site(group: argparse._ActionsContainer, default: str = "head") -> None:
    group.add_argument(
        "--site", choices=SITES, default=default, metavar="SITE", help=f"{', '.join(SITES)} (default: {default})"
    )


def layers(group: argparse._ActionsContainer, *, required: bool = False) -> None:
    group.add_argument(
        "--layers", type=layer_list, required=required, metavar="LIST",
        help="layer numbers, such as 0,3,10-19,-1" + ("" if required else " (default: all)"),
    )  # fmt: skip


def positions(group: argparse._ActionsContainer, **more: Any) -> None:
    told = "the last one" if more else "every token"
    group.add_argument(
        "--positions", type=position_list, metavar="LIST",
        help=f"positions of tokens in the prompt, such as 0,-1 (default: {told})", **more,
    )  # fmt: skip


def steps(command: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """The options of every loop of steps."""
    group = command.add_argument_group("optimisation")
    number(group, "--steps", positive_int, defaults.STEPS, "number of optimizer steps")
    number(group, "--batch-size", positive_int, defaults.BATCH_SIZE, "examples per step")
    number(group, "--checkpoint-every", positive_int, defaults.CHECKPOINT_EVERY, "steps between two checkpoints")
    what = "compute layers again in the backward pass, to save memory: always, never, or auto, where memory says so"
    choice(group, "--recompute", tuple(RECOMPUTE), what, "WHEN")
    return group


def checkpoint(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--checkpoint", metavar="FILE", help="save progress to this file, and resume from it if it exists"
    )


SAVED = "a folder saved by demo, fit, interchange, extract or combine"


def intervention(command: argparse.ArgumentParser) -> None:
    command.add_argument("--intervention", required=True, metavar="FOLDER", help=SAVED)


def data(
    command: argparse.ArgumentParser, n_train: int = N_TRAIN, *, required: bool = True, recorded: bool = False
) -> None:
    """The options that choose examples.

    Args:
        n_train: the default number of training examples of a task.
        required: whether examples must be named.
        recorded: whether those of a fit's record are the default.
    """
    source = command.add_mutually_exclusive_group(required=required)
    source.add_argument(
        "--data", metavar="FILE",
        help="file of examples: JSONL, JSON, CSV or Parquet with the columns prompt (or messages), correct and wrong",
    )  # fmt: skip
    source.add_argument(
        "--task", choices=TASKS, metavar="TASK",
        help=f"a built-in task: {', '.join(TASKS)} (the last two are for interchange)",
    )  # fmt: skip
    command.add_argument(
        "--columns", type=column_names, action="append", metavar="FIELD=NAME",
        help="with --data: other names of columns, such as correct=answer,wrong=foil; may be repeated",
    )  # fmt: skip
    command.add_argument(
        "--chat", action="store_true",
        help="make each prompt the user's message in the model's chat template; the answer begins the reply",
    )  # fmt: skip
    command.add_argument(
        "--aligned", action="store_true", help="with --task: use prompts whose tokens are at the same positions"
    )
    command.add_argument(
        "--split", choices=("country", "template", "both"), metavar="WHAT",
        help="with --task country-capital: hold out country, template or both (default: country)",
    )  # fmt: skip
    for name, what, default in (("--n-train", "training", n_train), ("--n-test", "held-out", N_TEST)):
        command.add_argument(
            name, type=positive_int, default=None if recorded else default, metavar="N",
            help=f"with --task: number of {what} examples (default: {default})",
        )  # fmt: skip


def saved_with_examples(command: argparse.ArgumentParser, *, shared: bool = False) -> None:
    """A saved intervention, its model, and the examples that it is measured on."""
    saved = command.add_mutually_exclusive_group(required=True)
    saved.add_argument("folder", nargs="?", metavar="FOLDER", help=SAVED)
    saved.add_argument("--intervention", metavar="FOLDER", help="the same as FOLDER")
    model(command, MODEL_OF_FIT, shared=shared)
    data(command, required=False, recorded=True)
    command.add_argument(
        "--seed", type=int, metavar="N",
        help=f"with --task: random seed of the examples (default: that of the fit, otherwise {defaults.SEED})",
    )  # fmt: skip


def model(command: argparse.ArgumentParser, default: str = DEMO_MODEL, *, shared: bool = False) -> None:
    """The model and how it is loaded; `shared`: also by several processes, for the commands of `processes.COMMANDS`."""
    group = command.add_argument_group("model")
    group.add_argument(
        "--model", metavar="NAME_OR_PATH", help=f"name on the Hugging Face hub, or a folder (default: {default})"
    )
    group.add_argument(
        "--dtype", choices=DTYPES, default="auto", metavar="TYPE", help=", ".join(DTYPES) + " (default: as saved)"
    )
    group.add_argument(
        "--attn",
        metavar="NAME",
        help="attention implementation of transformers, such as eager, sdpa, flash_attention_2",
    )
    group.add_argument(
        "--quantize", choices=("none", *QUANTIZERS), metavar="NAME",
        help=f"quantise the weights on loading: {', '.join(QUANTIZERS)}, or none (default: "
        f"{'none' if default == DEMO_MODEL else 'as for the fit, unless --model is given'})",
    )  # fmt: skip
    group.add_argument(
        "--device-map", metavar="NAME",
        help="divide the layers between devices, as in transformers: auto, balanced, sequential (not with --device)",
    )  # fmt: skip
    for name, what in (
        ("--tp", "share each layer among N processes by tensor parallelism"),
        ("--fsdp", "shard the weights over N processes by FSDP2"),
    ):
        if shared:
            group.add_argument(
                name, type=positive_int, default=1, metavar="N",
                help=f"{what}; start the command with torchrun (default: 1)",
            )  # fmt: skip
    device(group)


def device(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--device", default="auto", metavar="NAME", help="cpu, cuda, cuda:1, … (default: a GPU if there is one)"
    )
    group.add_argument("--threads", type=positive_int, metavar="N", help="CPU threads (default: PyTorch's choice)")


def paths(command: argparse.ArgumentParser) -> None:
    """Module paths for a model whose parts cannot be told apart; saved interventions keep theirs."""
    group = command.add_argument_group("module paths, for models whose structure is not recognised")
    group.add_argument("--layers-path", metavar="PATH", help="the list of layers in the model, such as model.layers")
    group.add_argument(
        "--projection", metavar="PATH", help="the attention's output projection in a layer, such as self_attn.o_proj"
    )
    group.add_argument("--mlp", metavar="PATH", help="the MLP in a layer, such as mlp")


def given_paths(parsed: argparse.Namespace) -> dict[str, Any]:
    """The module paths that were given, as `for_model(**...)` and `paths=` take them."""
    found = {name: getattr(parsed, name, None) for name in ("layers_path", "projection", "mlp")}
    return {name: path for name, path in found.items() if path is not None}
