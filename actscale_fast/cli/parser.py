"""Commands and their options. Nothing heavy is imported here: `--help` answers at once."""

from __future__ import annotations

import argparse
import functools
from typing import Any

from .. import defaults
from .._version import __version__
from . import options, parser_extract, parser_learning, parser_serving
from .suggesting_parser import SuggestingParser
from .values import positive_int, share, strength_list, weight


class _Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=110)


def build_parser() -> SuggestingParser:
    """The parser of the whole command line; `command` names the chosen command."""
    parser = SuggestingParser(
        prog="actscale-fast",
        formatter_class=_Help,
        description="Learn and apply signed scalars on the activations of a frozen language model.",
        epilog="Start with:  actscale-fast demo\n\n"
        "Exit status: 0 success; 1 failure, with one line that says why; 2 wrong usage; 130 interrupted.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}", help="print the version")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    add = functools.partial(_command, commands)
    _demo(add("demo", "[options]", "learn scalars on a small real model and see that they work"))
    learned = "(--data FILE | --task TASK) --out FOLDER [options]"
    parser_learning.fit(add("fit", learned, "learn an intervention from examples"))
    parser_learning.sweep(add("sweep", learned, "fit many interventions at once and compare them"))
    parser_learning.attribution(add("attribution", learned, "find what each head contributes to the answers"))
    parser_learning.heads(add("heads", learned, "choose the attention heads to scale, by one or several methods"))
    pairs = "(--data FILE | --task TASK) --layers LIST --out FOLDER [options]"
    parser_learning.interchange(add("interchange", pairs, "learn which directions hold a variable of a task"))
    parser_extract.extract(
        add("extract", "RECIPE [options]", "take steering vectors from activations"),
        functools.partial(_command, before="extract "),
    )
    parser_extract.combine(add("combine", "FOLDER FOLDER … --out FOLDER [--factors LIST]", "add several interventions"))
    examples = "FOLDER [--data FILE | --task TASK] [options]"
    _evaluate(add("evaluate", examples, "measure an intervention on examples, beside the frozen model"))
    parser_learning.stress(
        add("stress", examples, "test whether an intervention holds on changed prompts, and its cost")
    )
    _info(add("info", "FOLDER [options]", "say what a saved intervention is"))
    prompt = "--intervention FOLDER --prompt TEXT [options]"
    _generate(add("generate", prompt, "continue a prompt under one or several strengths"))
    picture = "(--intervention FOLDER | --history FILE) --out FILE [options]"
    _plot(add("plot", picture, "draw an intervention or the history of a fit"))
    merged = "--intervention FOLDER --out FOLDER [options]"
    _merge(add("merge", merged, "write an intervention into a model's weights and save the model"))
    parser_serving.serving(
        add("serving", "(list | add | remove) [options]", "show and change what a running vLLM server can steer by"),
        functools.partial(_command, before="serving "),
    )
    parser_learning.reproduce(
        add("reproduce", "--out FOLDER [options]", "compare all systems on a model, or on several, in one report")
    )
    parser_learning.plan(
        add("plan", "--model NAME_OR_PATH --tokens N [options]", "predict the memory of a fit from a model's config")
    )
    _verify(add("verify", "[options]", "test the kernels on this machine and choose the fastest"))
    _completion(add("completion", "SHELL", "print a script that completes commands and options with the TAB key"))
    _doctor(add("doctor", "[options]", "say which kernels were built, which run here, and why the others do not"))
    bench = add("bench", "[-- ARGUMENTS]", "run the benchmarks of a source checkout")
    bench.description = (
        "Runs `python -m benchmarks` in the checkout with all further arguments, for example\n"
        "  actscale-fast bench -- --help"
    )
    return parser


def _command(
    commands: argparse._SubParsersAction[Any], name: str, usage: str, short: str, before: str = ""
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        usage=f"actscale-fast {before}{name} {usage}",
        help=short,
        description=f"{short[0].upper()}{short[1:]}.",
        formatter_class=_Help,
        allow_abbrev=False,
    )
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    if name not in ("bench", "completion", "extract", "serving"):  # the commands below have these themselves
        command.add_argument(
            "--quiet", action="store_true", help="print results, warnings and errors only, without progress"
        )
        command.add_argument(
            "--config", metavar="FILE",
            help="take options from this TOML or JSON file; those of the command line replace its own",
        )  # fmt: skip
    return command


def _demo(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Builds country-capital conflicts (prompts that claim a wrong capital), learns one scalar per attention head\n"
        "that flips the model between what it remembers and what it was told, measures the scalars on countries that\n"
        "do not occur in training, saves them with a heat map, and continues a few prompts under three strengths."
    )
    options.model(command)
    command.add_argument(
        "--out", default="actscale-demo", metavar="FOLDER", help="output folder (default: ./actscale-demo)"
    )
    options.number(command, "--steps", positive_int, defaults.STEPS, "number of optimizer steps")
    options.seed(command)


def _evaluate(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Measures an intervention on examples, beside the frozen model. By default these are the examples that the\n"
        "fit held out, which are found again from its record (fit.json) and must be the same, on the model of the fit."
    )
    options.saved_with_examples(command, shared=True)
    options.as_json(command)
    options.number(command, "--batch-size", positive_int, 32, "examples per forward pass")
    command.add_argument("--out", metavar="FILE", help="also write the figures to this file, as JSON")


def _completion(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Prints a script that completes commands, options and their values with the TAB key. For the running shell:\n"
        '  eval "$(actscale-fast completion bash)"\n'
        '  eval "$(actscale-fast completion zsh)"\n'
        "  actscale-fast completion fish | source\n"
        "The same line in ~/.bashrc, ~/.zshrc or ~/.config/fish/config.fish serves all later ones."
    )
    command.add_argument("shell", choices=options.SHELLS, metavar="SHELL", help=", ".join(options.SHELLS))


def _info(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Prints what a folder saved by demo, fit, interchange, extract or combine holds: the kind of intervention,\n"
        "the model, site, layers and positions, how many parameters are active, the largest, and how it was learned."
    )
    command.add_argument("folder", metavar="FOLDER", help=options.SAVED)
    options.as_json(command)


def _verify(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Tests every kernel against plain PyTorch in float64, in processes of its own, and times the backends. The\n"
        'verdict is kept for this device, driver, PyTorch, Triton and build; the backend "auto" uses what passed and\n'
        "is fastest. Exit status 1 if a kernel did not pass."
    )
    options.device(command)
    command.add_argument("--full", action="store_true", help="time for longer, with torch.compile beside the kernels")
    command.add_argument("--report", action="store_true", help="print the verdict that is there, for a bug report")
    options.as_json(command)


def _doctor(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Prints the versions, what the compiled extension holds (SIMD levels, CUDA architectures and those that were\n"
        "left out at installation), the devices, and each backend with the reason if it cannot run. Nothing is changed."
    )
    options.as_json(command)


def _generate(command: argparse.ArgumentParser) -> None:
    options.intervention(command)
    options.model(command, options.MODEL_OF_FIT, shared=True)
    command.add_argument(
        "--prompt", required=True, action="append", metavar="TEXT", help="the text to continue; may be repeated"
    )
    command.add_argument(
        "--source", action="append", metavar="TEXT",
        help="with an intervention saved by interchange: the prompt whose activations are used, one for each --prompt",
    )  # fmt: skip
    command.add_argument(
        "--strength", type=strength_list, action="append", metavar="LIST",
        help="one or several strengths, such as -1,0,1; may be repeated (default: -1,0,1)",
    )  # fmt: skip
    options.number(command, "--max-new-tokens", positive_int, 20, "number of tokens to generate")
    sampling = command.add_argument_group("sampling")
    sampling.add_argument(
        "--temperature", type=weight, metavar="X", help="draw tokens at this temperature; 0 is greedy (default: greedy)"
    )
    sampling.add_argument(
        "--top-p", type=share, metavar="X",
        help="draw from the most likely tokens whose probabilities add up to X (default with --temperature: 1)",
    )  # fmt: skip
    options.seed(sampling, what="random seed of the draws, which all strengths share")
    command.add_argument("--stream", action="store_true", help="print each token when it is generated")
    options.as_json(command)
    command.add_argument("--chat", action="store_true", help="wrap the prompt in the model's chat template")


def _plot(command: argparse.ArgumentParser) -> None:
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument("--intervention", metavar="FOLDER", help="draw its scalars as a signed heat map")
    source.add_argument("--history", metavar="FILE", help="draw the terms of the objective, from a fit's history.json")
    command.add_argument("--out", required=True, metavar="FILE", help="picture file: .png, .pdf or .svg")
    command.add_argument("--title", metavar="TEXT", help="title above the picture (default: what it shows)")


def _merge(command: argparse.ArgumentParser) -> None:
    options.intervention(command)
    options.model(command, options.MODEL_OF_FIT)
    options.number(command, "--strength", float, 1.0, "strength β to merge with", "X")
    options.out(command, "the merged model and its tokenizer")
