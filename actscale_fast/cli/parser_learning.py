"""The options of the commands that learn or measure: fit, sweep, interchange, attribution, heads, reproduce."""

from __future__ import annotations

import argparse

from .. import defaults
from . import options
from .values import (
    count_list,
    layer_list,
    minimality,
    minimality_list,
    name_list,
    named_value,
    positive_float,
    positive_int,
    rate,
    rate_list,
    seed_list,
    share,
    site_list,
    weight,
    weight_list,
)

#: For help texts, where % is written twice.
_MINIMALITY, _VECTOR_MINIMALITY, _LR = (f"{s}%" for s in (defaults.MINIMALITY, defaults.VECTOR_MINIMALITY, defaults.LR))


def fit(command: argparse.ArgumentParser) -> None:
    options.model(command, shared=True)
    options.data(command)
    options.paths(command)
    options.test_data(command)
    options.out(command, "the intervention")
    options.as_json(command)
    what = "activ-scalar h·(1+β·α), steer-vec h+β·v, dyn-scalar h·(1+β·⟨u,h⟩)"
    options.choice(command, "--kind", ("activ-scalar", "steer-vec", "dyn-scalar"), what, "KIND")
    where = command.add_argument_group("where the model is changed")
    where.add_argument(
        "--site", type=site_list, default=["head"], metavar="LIST",
        help=f"{', '.join(options.SITES)}; several, such as attn_out,mlp_out, are learned together (default: head)",
    )  # fmt: skip
    options.layers(where)
    options.positions(where)
    where.add_argument(
        "--generated", action="store_true",
        help="with --positions: add a slot for generated tokens; it is learned only from answers of several tokens",
    )  # fmt: skip
    objective = command.add_argument_group("objective")
    options.number(objective, "--margin", weight, defaults.MARGIN, "desired logit difference", "X")
    options.number(objective, "--faithfulness", weight, defaults.FAITHFULNESS, "weight of the KL divergence", "X")
    objective.add_argument(
        "--minimality", type=minimality, metavar="X",
        help="weight of the ℓ1 norm, or a share such as 10%% of the smallest weight that keeps every parameter at 0 "
        f"(default: {_MINIMALITY}; {_VECTOR_MINIMALITY} for steer-vec and dyn-scalar)",
    )  # fmt: skip
    objective.add_argument(
        "--n-active", type=positive_int, metavar="N",
        help="with activ-scalar: the largest number of active scalars; chooses the weight of the ℓ1 norm itself, then "
        "fits the chosen scalars without it",
    )  # fmt: skip
    options.choice(
        objective, "--kl", ("forward", "reverse"), "direction of the KL divergence, forward or reverse", "KIND"
    )
    objective.add_argument(
        "--include-answers",
        action="store_true",
        help="include the two answers in the KL divergence (default: leave out)",
    )
    options.choice(
        objective, "--sparsity", ("parameters", "scalars"),
        "what the ℓ1 norm is taken of: parameters, or with dyn-scalar the scalars that they produce", "KIND",
    )  # fmt: skip
    objective.add_argument(
        "--one-direction", action="store_true", help="learn only to flip to the correct answer (β = +1)"
    )
    steps = options.steps(command)
    steps.add_argument(
        "--lr", type=rate, metavar="X",
        help="learning rate: a share such as 5%% of the activation's size, or a number in the parameters' units "
        f"(default: {_LR})",
    )  # fmt: skip
    what = "learning-rate schedule: constant, or cosine or linear decay to 0"
    options.choice(steps, "--schedule", (defaults.SCHEDULE, "linear", "constant"), what, "KIND")
    options.number(steps, "--accumulate", positive_int, defaults.ACCUMULATE, "batches per step")
    options.seed(steps)
    options.checkpoint(steps)


def sweep(command: argparse.ArgumentParser) -> None:
    options.model(command, shared=True)
    options.data(command, required=False)
    options.paths(command)
    command.add_argument(
        "--seed", type=int, default=defaults.SEED, metavar="N",
        help=f"random seed of the fits and, with --task, of the examples (default: {defaults.SEED})",
    )  # fmt: skip
    command.add_argument(
        "--task-seed", type=int, metavar="N", help="with --task: random seed of the examples alone (default: --seed)"
    )
    options.test_data(command)
    options.out(command, "the fits, one folder each; an interrupted sweep resumes from it")
    command.add_argument("--plot", metavar="FILE", help="picture of the Pareto front (default: front.png in --out)")
    where = command.add_argument_group("where the model is changed")
    options.site(where)
    options.positions(where)
    grid = command.add_argument_group("grid: every combination of these lists is fitted")
    for name, kind, what, default in (
        ("minimality", minimality_list, "weights of the ℓ1 norm, or shares such as 50%%,10%%", _MINIMALITY),
        ("faithfulness", weight_list, "weights of the KL divergence", defaults.FAITHFULNESS),
        ("margin", weight_list, "desired logit differences", defaults.MARGIN),
        ("lr", rate_list, "learning rates, as shares of the activation's size or numbers", _LR),
    ):
        grid.add_argument(f"--{name}", type=kind, metavar="LIST", help=f"{what} (default: {default})")
    grid.add_argument(
        "--seeds", type=seed_list, metavar="LIST", help="random seeds of the fits, such as 0-2 (default: --seed)"
    )  # fmt: skip
    grid.add_argument(
        "--layers", type=layer_list, action="append", metavar="LIST",
        help="layer numbers, such as 10-19; repeat the option for several sets (default: all)",
    )  # fmt: skip
    grid.add_argument(
        "--path", type=positive_int, metavar="N",
        help="N weights of the ℓ1 norm, descending from the one that keeps every scalar at 0",
    )  # fmt: skip
    grid.add_argument(
        "--warm-start", action="store_true",
        help="start each fit from the result of the next larger --minimality, all else being equal",
    )  # fmt: skip
    jobs = command.add_argument_group("jobs that divide a grid between them")
    jobs.add_argument(
        "--points", metavar="I/N",
        help="fit the I-th of N shares of the grid, counted from 1; all jobs get the same options and the same --out",
    )  # fmt: skip
    jobs.add_argument(
        "--gather", action="store_true",
        help="only check that all points in --out are finished, write its sweep.json, and draw the front",
    )  # fmt: skip
    jobs.add_argument(
        "--at-once", type=positive_int, metavar="N",
        help="fits in progress at the same time; with 1 a fit has the same bits in any job (default: all)",
    )  # fmt: skip
    options.steps(command).add_argument(
        "--tolerance", type=weight, metavar="X", help="stop a fit whose scalars change by no more than this"
    )


def attribution(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Predicts from one gradient how removing each head would change the logit difference between the two\n"
        "answers, measures it by removing one head at a time, and writes both to attribution.json and attribution.png."
    )
    options.model(command, shared=True)
    options.data(command, n_train=32)  # each example runs once for every head
    options.paths(command)
    options.seed(command, what="with --task: random seed of the examples")
    options.out(command, "the figures and the picture")
    options.as_json(command)
    options.site(command)
    options.layers(command)
    options.positions(command)
    command.add_argument("--no-knock-out", action="store_true", help="only predict, which takes seconds")
    options.number(command, "--top", positive_int, 10, "number of heads to print")


def heads(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Scores all attention heads by one of several methods, keeps the best, chooses their strength on training\n"
        "examples that are held back, and saves the intervention with heads.json and heads.png. With several methods\n"
        "or numbers of heads it compares them on the held-out examples: comparison.json, and a folder for each."
    )
    options.model(command, shared=True)
    options.data(command, n_train=64)
    options.seed(command, what="random seed of the split, of what a method draws and, with --task, of the examples")
    options.test_data(command)
    options.out(command, "the selection and its intervention")
    options.as_json(command)
    choice = command.add_argument_group("heads")
    choice.add_argument(
        "--method", type=name_list, default=["attribution"], metavar="LIST",
        help=f"{', '.join(options.HEAD_METHODS)}; several are compared (default: attribution)",
    )  # fmt: skip
    choice.add_argument(
        "--k", type=count_list, default=[10], metavar="LIST", help="number of heads; several are compared (default: 10)"
    )
    options.layers(choice)
    choice.add_argument(
        "--option", type=named_value, action="append", metavar="NAME=VALUE",
        help="an option of the method, such as n_scored=4 or steps=30; may be repeated",
    )  # fmt: skip
    strength = command.add_argument_group("strength")
    strength.add_argument(
        "--strengths", type=weight_list, metavar="LIST", help="strengths to try, such as 1,2,4 (default: the method's)"
    )
    options.number(strength, "--validation", share, 0.25, "share of the training examples that chooses it", "X")
    strength.add_argument(
        "--max-kl", type=weight, metavar="X",
        help="largest mean KL divergence of the other tokens, in nats, on these examples (default: any)",
    )  # fmt: skip
    options.choice(
        strength, "--direction", ("both", "correct", "wrong"), "flips that count: both, correct or wrong", "WHAT"
    )
    options.number(strength, "--batch-size", positive_int, 32, "examples per forward pass")


def stress(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Measures an intervention at one strength on the examples and on changed ones (other words, instructions,\n"
        "roles, lengths, letters), and what it does to unrelated text. Each of three gates passes or fails: control,\n"
        "utility and robustness. The examples are those that the fit held out, unless others are named."
    )
    options.saved_with_examples(command)
    test = command.add_argument_group("test")
    options.number(test, "--strength", positive_float, 1.0, "strength β", "X")
    options.choice(
        test, "--direction", ("both", "correct", "wrong"), "flips that count: both, correct (β) or wrong (−β)", "WHAT"
    )
    options.number(test, "--n-prompts", positive_int, 32, "largest number of examples; each runs some 40 times")
    test.add_argument(
        "--perturbations", type=name_list, metavar="LIST",
        help="some of paraphrase, instruction-continue, instruction-brief, role-expert, role-child, role-chat, "
        "role-system, length-1, length-4, lower-case, upper-case, spaces, typos (default: all that apply)",
    )  # fmt: skip
    test.add_argument(
        "--texts", metavar="FILE", help="plain texts for the perplexity, one per line (default: built-in)"
    )
    test.add_argument(
        "--harness", nargs="+", metavar="FILE",
        help="results of lm-evaluation-harness: of the frozen model, then under the intervention",
    )  # fmt: skip
    options.number(test, "--stress-seed", int, defaults.SEED, "random seed of typos, sentences and unrelated prompts")
    options.number(test, "--batch-size", positive_int, 32, "examples per forward pass")
    gates = command.add_argument_group("thresholds")
    for name, default, what in (
        ("min-control", 0.8, "least share flipped, over all prompts as given and changed"),
        ("min-gain", 0.1, "least gain of that share over the frozen model"),
        ("max-perplexity-ratio", 1.1, "largest growth of the perplexity of plain texts, as a factor"),
        ("max-kl", 0.1, "largest mean KL divergence after unrelated prompts, in nats"),
        ("max-accuracy-drop", 0.05, "largest loss of accuracy, with --harness"),
        ("max-drop", 0.2, "largest drop of the share flipped under a change of the prompts"),
        ("max-side-effect", 0.1, "largest loss of an unrelated behaviour"),
    ):
        options.number(gates, f"--{name}", weight, default, what, "X")
    options.as_json(command)
    command.add_argument("--out", metavar="FILE", help="also write the result to this file, as JSON")
    command.add_argument("--plot", metavar="FILE", help="also draw it: .png, .pdf or .svg")


def interchange(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Learns a rotation and a boundary (Boundless DAS): the directions of an activation that hold one variable of\n"
        "a task, so that a prompt that receives them from another prompt gets the counterfactual answer. The data are\n"
        'pairs: each row of --data has a "source", and "correct" is the counterfactual answer; or use the task\n'
        "name-order."
    )
    options.model(command)
    options.data(command)
    options.paths(command)
    options.test_data(command)
    options.out(command, "the intervention")
    where = command.add_argument_group("where activations are exchanged")
    options.site(where, "residual")
    options.layers(where, required=True)
    options.positions(where, default=[-1])
    steps = command.add_argument_group("optimisation")
    options.number(steps, "--epochs", positive_int, 3, "passes over the examples")
    options.number(steps, "--batch-size", positive_int, 16, "examples per step")
    options.number(steps, "--rotation-lr", positive_float, 1e-3, "learning rate of the rotation", "X")
    options.number(steps, "--boundary-lr", positive_float, 1e-2, "learning rate of the boundary", "X")
    options.number(steps, "--boundary-weight", weight, 1.0, "weight of the boundary in the loss", "X")
    options.seed(steps)
    options.checkpoint(steps)


def plan(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Predicts how much memory a fit of scalars takes on each device, with and without recomputed layers, and\n"
        "says what to set. Reads the model's config only, never its weights: a folder with a config.json is enough."
    )
    command.add_argument(
        "--model", required=True, metavar="NAME_OR_PATH", help="a folder with a config.json, or a name on the hub"
    )
    command.add_argument("--tokens", required=True, type=positive_int, metavar="N", help="tokens of a prompt")
    options.number(command, "--batch-size", positive_int, defaults.BATCH_SIZE, "examples per step")
    command.add_argument(
        "--accumulate", type=positive_int, metavar="N", help="passes per step (default: one for each example)"
    )
    options.number(command, "--n-examples", positive_int, options.N_TRAIN, "number of examples")
    command.add_argument(
        "--dtype", choices=options.DTYPES, default="auto", metavar="TYPE",
        help=", ".join(options.DTYPES) + " (default: as in the config)",
    )  # fmt: skip
    options.site(command)
    options.layers(command)
    options.number(command, "--tp", positive_int, 1, "processes that share each layer by tensor parallelism")
    options.number(command, "--fsdp", positive_int, 1, "processes over which FSDP2 shards the weights")
    command.add_argument(
        "--memory", type=positive_float, metavar="GB", help="memory of a device in GB, for the advice (default: none)"
    )
    options.as_json(command)


def reproduce(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Runs every system on both tasks with several seeds each, with equally many steps and with equal time,\n"
        "together with baselines, a path of ever sparser scalars, knock-outs, all methods that choose heads, transfer\n"
        "to other lengths and wordings, and the systems that need no training. Weights and rates are chosen on\n"
        "validation prompts. Writes report.md with pictures, report.html (one file) and the data as CSV. Started\n"
        "again with the same folder, it continues where it ended."
    )
    options.model(command)
    options.out(command, "the report")
    command.add_argument(
        "--models",
        metavar="NAME,NAME",
        help="several models, one after another, with a summary; demo is the demo's model",
    )
    command.add_argument(
        "--paper", action="store_true", help="the models of the paper: GPT-2 small to XL and Pythia 1.4B, from the hub"
    )
    command.add_argument(
        "--quick", action="store_true", help="use one seed, fewer prompts and fewer steps (about 15 minutes)"
    )
    command.add_argument("--seeds", type=positive_int, metavar="N", help="number of seeds (default: 5, with --quick 1)")
