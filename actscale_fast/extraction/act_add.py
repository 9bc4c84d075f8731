"""Activation addition: the difference between two prompts, added from the first token of another (arXiv 2308.10248)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .._checks import check_finite
from ..architectures.layout import layout
from ..frozen.encoder import TextEncoder
from ..frozen.reader import Reader
from ..interventions import SteerVec

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def act_add(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    positive: str,
    negative: str = "",
    *,
    layer: int,
    coefficient: float = 1.0,
    padding: str = " ",
    paths: dict[str, str] | None = None,
) -> SteerVec:
    """The steering vectors of a pair of prompts: c·(h⁺ − h⁻) token by token (arXiv 2308.10248, algorithm 1).

    h⁺ and h⁻ are the inputs of layer `layer`. The vector of token i is added there to token i of a prompt: once, and
    not while decoding. A prompt that is shorter takes as many as it has tokens. The paper finds middle layers most
    effective, with |c| below 15; sums of several pairs are `act_add(...) + act_add(...)`.

    Args:
        model, tokenizer: a causal language model of Hugging Face and its tokenizer; the model is left as it was.
        positive, negative: the two prompts, "Love" and "Hate". With the special tokens that open a text: a token that
            opens both stands at position 0, where their difference is 0.
        layer: counted from 0, negative from the end. Its input is the site "residual" of the layer below, so that layer
            0, whose input is the embedding's output, is refused.
        coefficient: c; 0 is the identity, and a negative one swaps the prompts.
        padding: the text, one token, that the shorter prompt is filled up with on the right. The paper's: a space, and
            not the token that ends a text.
        paths: module paths of a model of an unlisted family, as `SteerVec.for_model` takes them.

    Returns:
        A `SteerVec` at site "residual", layer `layer` − 1, positions 0 … n − 1 of the longer prompt's n tokens.

    Raises:
        TypeError, ValueError: a bad layer, coefficient or prompt, two prompts without a token, a padding that is not
            one token where one is needed.

    Example:
        >>> vector = act_add(model, tokenizer, "Love", "Hate", layer=6, coefficient=5)
        >>> with patch(model, vector):
        ...     model.generate(**tokenizer("I hate you because", return_tensors="pt"))
    """
    found = layout(model, paths)
    number = _checked_layer(layer, found.n_layers)
    check_finite(coefficient=coefficient)
    encoder = TextEncoder(found, tokenizer)
    pair = [encoder.opened(positive, "positive"), encoder.opened(negative, "negative")]
    longest = max(map(len, pair))
    if not longest:
        raise ValueError(f"positive, negative: got {positive!r} and {negative!r}, which have no tokens")
    encoder.check_length(longest, "positive, negative: the longer one")
    if len(pair[0]) != len(pair[1]):
        filling = encoder.plain(padding, "padding")
        if len(filling) != 1:
            raise ValueError(f"padding: {padding!r} is {len(filling)} tokens of the tokenizer, expected one")
        pair = [ids + filling * (longest - len(ids)) for ids in pair]
    with Reader(model, "residual", [number - 1], paths) as read:
        states = read(torch.tensor(pair, device=encoder.device))[0].double()  # [2, n, 1, d]
    vector = SteerVec.for_model(model, "residual", [number - 1], range(longest), **(paths or {}))  # type: ignore[arg-type]
    with torch.no_grad():
        vector.vectors.copy_((coefficient * (states[0] - states[1]))[None])
    return vector


def _checked_layer(layer: object, n_layers: int) -> int:
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise TypeError(f"layer: got {layer!r}, expected an int")
    if not -n_layers <= layer < n_layers:
        raise ValueError(f"layer: got {layer}, expected 1 to {n_layers - 1} or {1 - n_layers} to -1")
    if layer % n_layers == 0:
        raise ValueError(
            f"layer: got {layer}, the first one: its input is the embedding's output, which is no site; expected 1 to "
            f"{n_layers - 1} or {1 - n_layers} to -1"
        )
    return layer % n_layers
