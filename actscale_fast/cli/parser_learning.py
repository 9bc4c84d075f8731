"""The options of the commands that learn or measure: fit, sweep, interchange, attribution, reproduce."""

from __future__ import annotations

import argparse

from .. import defaults
from . import options
from .values import (
    layer_list,
    position_list,
    positive_float,
    positive_int,
    rate_list,
    seed_list,
    site_list,
    weight,
    weight_list,
)


def fit(command: argparse.ArgumentParser) -> None:
    options.model(command)
    options.data(command)
    options.paths(command)
    command.add_argument("--test-data", metavar="FILE", help="JSONL file of held-out examples to measure on afterwards")
    command.add_argument("--out", required=True, metavar="FOLDER", help="where the intervention is saved")
    command.add_argument(
        "--kind",
        choices=options.KINDS,
        default=options.KINDS[0],
        metavar="KIND",
        help="activ-scalar h·(1+β·α), steer-vec h+β·v, dyn-scalar h·(1+β·⟨u,h⟩) (default: %(default)s)",
    )
    where = command.add_argument_group("where the model is changed")
    where.add_argument(
        "--site",
        type=site_list,
        default=["head"],
        metavar="LIST",
        help=", ".join(options.SITES) + "; several, such as attn_out,mlp_out, are learned together (default: head)",
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
        metavar="X",
        help=f"weight of the ℓ1 norm (default: {defaults.MINIMALITY}; vectors, probes {defaults.VECTOR_MINIMALITY})",
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
    objective.add_argument(
        "--sparsity",
        choices=("parameters", "scalars"),
        default="parameters",
        metavar="KIND",
        help="what the ℓ1 norm is of: parameters, or of dyn-scalar the scalars it produces (default: parameters)",
    )
    objective.add_argument("--one-direction", action="store_true", help="only towards the correct answer (β = +1)")
    steps = options.steps(command)
    steps.add_argument(
        "--lr",
        type=positive_float,
        metavar="X",
        help=f"learning rate (default: {defaults.LR}; of vectors and probes {defaults.VECTOR_LR})",
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


def sweep(command: argparse.ArgumentParser) -> None:
    options.model(command)
    options.data(command)
    options.paths(command)
    command.add_argument("--task-seed", type=int, default=defaults.SEED, metavar="N", help="of a task's examples")
    command.add_argument("--test-data", metavar="FILE", help="JSONL file of held-out examples to measure on afterwards")
    command.add_argument(
        "--out", required=True, metavar="FOLDER", help="one folder a fit; an interrupted sweep goes on"
    )
    command.add_argument("--plot", metavar="FILE", help="the picture of the front (default: front.png in that folder)")
    where = command.add_argument_group("where the model is changed")
    where.add_argument("--site", choices=options.SITES, default="head", metavar="SITE", help="default: head")
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
    steps = options.steps(command)
    steps.add_argument(
        "--tolerance", type=weight, metavar="X", help="stop a fit whose scalars move by no more than this"
    )


def attribution(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Predicts what removing each head would change in the logit difference of the two answers, from one gradient;\n"
        "measures it by removing one at a time; writes both to attribution.json and attribution.png."
    )
    options.model(command)
    options.data(command)
    options.paths(command)
    command.set_defaults(n_train=32)  # of a task, those that are run: each runs once for every head
    command.add_argument("--seed", type=int, default=defaults.SEED, metavar="N", help="of a task's examples")
    command.add_argument("--out", required=True, metavar="FOLDER", help="where the figures and the picture are written")
    command.add_argument("--site", choices=options.SITES, default="head", metavar="SITE", help="default: head")
    command.add_argument("--layers", type=layer_list, metavar="LIST", help="such as 0,3,10-19,-1 (default: all)")
    command.add_argument("--positions", type=position_list, metavar="LIST", help="tokens of the prompt (default: all)")
    command.add_argument("--no-knock-out", action="store_true", help="only predict, which takes seconds")
    command.add_argument(
        "--top", type=positive_int, default=10, metavar="N", help="lines printed (default: %(default)s)"
    )


def interchange(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Learns a rotation and a boundary (Boundless DAS): which directions of an activation carry one variable of a\n"
        "task, so that giving a prompt those of another prompt gives it the counterfactual answer. Needs pairs: data\n"
        'with a "source" for each prompt, "correct" being the counterfactual answer, or the task name-order.'
    )
    options.model(command)
    options.data(command)
    options.paths(command)
    command.add_argument("--test-data", metavar="FILE", help="JSONL file of held-out pairs to measure on afterwards")
    command.add_argument("--out", required=True, metavar="FOLDER", help="where the intervention is saved")
    where = command.add_argument_group("where activations are exchanged")
    where.add_argument("--site", choices=options.SITES, default="residual", metavar="SITE", help="default: residual")
    where.add_argument("--layers", type=layer_list, required=True, metavar="LIST", help="such as 15")
    where.add_argument(
        "--positions", type=position_list, default=[-1], metavar="LIST", help="tokens of the prompt (default: the last)"
    )
    steps = command.add_argument_group("the steps")
    steps.add_argument("--epochs", type=positive_int, default=3, metavar="N", help="default: %(default)s")
    steps.add_argument("--batch-size", type=positive_int, default=16, metavar="N", help="default: %(default)s")
    for name, default, what in (
        ("rotation-lr", 1e-3, "learning rate of the rotation"),
        ("boundary-lr", 1e-2, "learning rate of the boundary"),
    ):
        steps.add_argument(
            f"--{name}", type=positive_float, default=default, metavar="X", help=f"{what} (default: %(default)s)"
        )
    steps.add_argument(
        "--boundary-weight", type=weight, default=1.0, metavar="X", help="of the boundary in the loss (default: 1)"
    )
    steps.add_argument("--seed", type=int, default=defaults.SEED, metavar="N", help="default: %(default)s")
    steps.add_argument("--checkpoint", metavar="FILE", help="kept up to date; resumed from where it exists")


def reproduce(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Runs every system on both tasks, several seeds each, with baselines, the path of ever sparser scalars,\n"
        "knock-outs, transfer to other lengths, and the recipes that learn nothing; writes report.md with pictures.\n"
        "Started again with the same folder it goes on where it ended."
    )
    options.model(command)
    command.add_argument("--out", required=True, metavar="FOLDER", help="of the report")
    command.add_argument("--quick", action="store_true", help="one seed, fewer prompts and steps")
