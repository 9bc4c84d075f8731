"""`actscale-fast extract` and `combine`: steering vectors from activations, and sums of interventions."""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import extraction
from ..interventions import Intervention, SteerVec, load_intervention
from .loading import load_model, output_folder
from .options import given_paths
from .output import say
from .verbosity import shows_progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def extract(options: argparse.Namespace) -> int:
    """Make an intervention by a recipe and save it."""
    recipes = {
        "act-add": _act_add,
        "mean-centring": _mean_centring,
        "instruction": _instruction,
        "latent": _latent,
    }
    given = _files(options)
    out = output_folder(options.out)
    model, tokenizer = load_model(options)
    intervention = recipes[options.recipe](options, model, tokenizer, given)
    intervention.save_pretrained(out)
    say(f"saved in {out}: {intervention!r}")
    return 0


def combine(options: argparse.Namespace) -> int:
    """Save a sum of interventions, each times its factor."""
    factors = options.factors or [1.0] * len(options.parts)
    if len(factors) != len(options.parts):
        raise ValueError(f"factors: got {len(factors)} for {len(options.parts)} interventions, expected one for each")
    parts = [load_intervention(folder) for folder in options.parts]
    multiples = [part if factor == 1.0 else factor * part for factor, part in zip(factors, parts, strict=True)]
    total = functools.reduce(lambda first, second: first + second, multiples)
    total.save_pretrained(output_folder(options.out))
    say(f"saved in {options.out}: {total!r}")
    return 0


def _files(options: argparse.Namespace) -> dict[str, Any]:
    """The contents of a recipe's files, read before the model is loaded."""
    if options.recipe == "mean-centring":
        return {name: _lines(getattr(options, name), name) for name in ("target", "training")}
    if options.recipe == "instruction":
        if (options.mode == "add") == (options.coefficient is None):
            raise ValueError("--coefficient is required with --mode add, and not available with --mode projection")
        return {"pairs": _pairs(options.data)}
    return {}


def _act_add(
    options: argparse.Namespace, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, _: dict[str, Any]
) -> Intervention:
    return extraction.act_add(
        model, tokenizer, options.positive, options.negative, layer=options.layer, coefficient=options.coefficient,
        paths=given_paths(options),
    )  # fmt: skip


def _mean_centring(
    options: argparse.Namespace, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, given: dict[str, Any]
) -> Intervention:
    return extraction.mean_centring(
        model, tokenizer, given["target"], given["training"], layers=options.layers, site=options.site,
        coefficient=options.coefficient, positions=None if options.every_token else options.positions,
        progress=shows_progress(options),
        generated=not options.every_token, skip=options.skip, paths=given_paths(options),
    )  # fmt: skip


def _instruction(
    options: argparse.Namespace, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, given: dict[str, Any]
) -> Intervention:
    pairs = given["pairs"]
    told, plain = [pair["with"] for pair in pairs], [pair["without"] for pair in pairs]
    vectors = extraction.instruction_vectors(
        model,
        tokenizer,
        told,
        plain,
        layers=[options.layer],
        paths=given_paths(options),
        progress=shows_progress(options),
    )
    (layer,) = vectors.location.layers
    return vectors.add(layer, options.coefficient) if options.mode == "add" else vectors.projection(layer)


def _latent(
    options: argparse.Namespace, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, _: dict[str, Any]
) -> Intervention:
    more: dict[str, Any] = {} if options.steps is None else {"steps": options.steps}
    more |= {"paths": given_paths(options), "seed": options.seed, "progress": shows_progress(options)}
    result = extraction.latent_vectors(model, tokenizer, [options.sentence], layer=options.layer, **more)
    vector: SteerVec = result.vectors[0]
    said = extraction.decode_latent(model, tokenizer, vector)
    say(f"with the vector the model says {said!r}" + ("" if result.exact[0] else ", which is not the sentence"))
    return vector


def _lines(name: str, option: str) -> list[str]:
    path = Path(name)
    if not path.is_file():
        raise FileNotFoundError(f"{option}: there is no file {name}")
    lines = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{option}: {name} has no text, expected one per line")
    return lines


def _pairs(name: str) -> list[dict[str, str]]:
    pairs = []
    for number, line in enumerate(_lines(name, "data"), 1):
        try:
            pair = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name}, line {number}: not JSON ({error.msg}, column {error.colno})") from None
        if (
            not isinstance(pair, dict)
            or sorted(pair) != ["with", "without"]
            or not all(isinstance(text, str) for text in pair.values())
        ):
            raise ValueError(
                f"{name}, line {number}: got {line[:60]!r}, expected strings under the keys 'with' and 'without'"
            )
        pairs.append(pair)
    return pairs
