"""Activation addition: the difference between two prompts, added to the first tokens of a third (arXiv 2308.10248)."""

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
    """The steering vectors c·(h⁺ − h⁻) of a pair of prompts, token by token (arXiv 2308.10248, algorithm 1).

    h⁺ and h⁻ are the inputs of layer `layer`. The vector of token i is added to token i of a prompt, but not while
    decoding; a shorter prompt uses as many vectors as it has tokens. The paper finds middle layers most effective, with
    |c| below 15. Add several pairs with `act_add(...) + act_add(...)`.

    Args:
        model, tokenizer: a Hugging Face causal language model and its tokenizer; the model is left unchanged.
        positive, negative: the two prompts, such as "Love" and "Hate", including the special tokens that open a text; a
            token that opens both is at position 0, where their difference is 0.
        layer: counted from 0, negative from the end. Its input is the site "residual" of the layer below; layer 0,
            whose input is the embedding's output, is refused.
        coefficient: c; 0 is the identity, and a negative value swaps the prompts.
        padding: a text of one token that the shorter prompt is padded with on the right; a space, as in the paper.
        paths: module paths for a model whose structure is not recognised, as in `SteerVec.for_model`.

    Returns:
        A `SteerVec` at site "residual", layer `layer` − 1, positions 0 … n − 1 of the longer prompt's n tokens.

    Raises:
        TypeError, ValueError: an invalid layer, coefficient or prompt, two prompts without tokens, or a padding that is
            needed but not a single token.

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
            raise ValueError(f"padding: {padding!r} is {len(filling)} tokens, expected one")
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
            f"layer: got {layer}, whose input is the embedding's output, which is not a site; expected 1 to "
            f"{n_layers - 1} or {1 - n_layers} to -1"
        )
    return layer % n_layers
