"""The arguments of one forward pass, recognised by what they are and not by their names.

Libraries rename arguments (transformers 5.24 calls `past_key_values` `cache`), and an argument that is looked up by an
old name seems to be absent: a cached step would then pass for a new prompt. The KV cache is therefore recognised by
its type, and an unknown argument that may say where tokens stand is refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..architectures.arguments import named

#: Arguments that may hold an integer or a boolean per token without changing where the tokens stand.
_PER_TOKEN = frozenset(
    {
        "input_ids", "attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids", "labels", "langs",
        "decoder_input_ids", "decoder_attention_mask", "encoder_attention_mask", "cross_attention_mask",
        "full_text_row_masked_out_mask", "head_mask", "cross_attn_head_mask", "position_bucket_ids",
    }
)  # fmt: skip
#: Names of what one pass hands to the next.
_CARRIED = re.compile(r"(^|_)(cache|caches|past|mems|mem_cache|memory|state|states|buckets)(_|$)")
#: Names of what an encoder or another modality provides.
_OTHER_SENSES = re.compile(r"(^|_)(vision|visual|image|images|audio|video|pixel|pixels|encoder|cross|deepstack)(_|$)")
_NOT_CARRIED = re.compile(r"hidden_states|cross_attention_states|vision|image|audio|encoder|cache_position|^use_")


@dataclass(frozen=True)
class Prompt:
    """How much of a sequence is prompt: the columns, padding included, and which of them hold real tokens."""

    length: int
    mask: Tensor | None = None  # [B, length] bool; None: all real


@dataclass(frozen=True)
class Call:
    """The arguments of one forward pass of a decoder, and the prompt that it belongs to."""

    values: dict[str, Any]
    tokens: Tensor  # ids [B, T] or embeddings [B, T, d]
    prompt: Prompt | None = None  # as generate() or `Patch.prompt` announced it
    #: The arguments of the whole model's pass that this pass is part of; None: the decoder was called directly.
    model_arguments: dict[str, Any] | None = None
    makes_cache: bool = False  # the decoder creates a cache where it is given none

    @property
    def n_rows(self) -> int:
        return self.tokens.shape[0]

    @property
    def n_tokens(self) -> int:
        return self.tokens.shape[1]

    @property
    def mask(self) -> Any:
        """The attention mask as the decoder got it: a tensor, a dictionary of 4-D masks, or None."""
        return self.values.get("attention_mask")

    @property
    def padding(self) -> Tensor | None:
        """The mask [B, S] of real tokens; None: all are real.

        Raises:
            ValueError: neither the decoder nor the whole model got a 2-D mask, but a mask of another kind.
        """
        mask = self.mask
        if mask is not None and self.model_arguments is not None and not _is_flat(mask):  # made from the model's own
            mask = self.model_arguments.get("attention_mask")
        if mask is None or _is_flat(mask):
            return mask
        raise ValueError(
            "attention_mask: positions need the 2-D mask [B, T], or the prompt announced: `with handle.prompt(n, mask)`"
        )

    @property
    def packed(self) -> bool:
        """Whether sequence lengths say that one row holds several sequences."""
        return any(value is not None and name.startswith("cu_seq_len") for name, value in self.values.items())

    @property
    def cache(self) -> Any:
        """The KV cache, whatever its argument is called; None: there is none."""
        return cache_among(self.values)

    @property
    def past(self) -> int | Tensor:
        """The number of tokens in the KV cache: an int, or for a static cache a tensor on its device."""
        cache = self.cache
        if cache is None:
            return 0
        try:
            length = cache.get_seq_length()
        except ValueError as error:  # transformers: only states of linear attention, which have no length
            raise ValueError(f"positions: the length of the {type(cache).__name__} is not known: {error}") from None
        return length if isinstance(length, Tensor) else int(length)

    @property
    def sequence_numbers(self) -> Tensor | None:
        """int64 [R, T], the number of the sequence in its row that each token belongs to; None: one sequence per row.

        Without a mask and a cache, transformers starts a new sequence wherever position ids do not increase by 1.

        Raises:
            ValueError: a row holds several sequences but the pass has a cache, so that attention would mix them.
        """
        positions = self.values.get("position_ids")
        if not isinstance(positions, Tensor) or self.mask is not None or self.prompt is not None:
            return None
        if positions.dim() == 3:  # [time, height, width] of images; a fourth one, which comes first, counts text
            positions = positions[0] if positions.shape[0] == 4 else None
        elif positions.dim() == 1:
            positions = positions[None]
        if positions is None or positions.shape[-1] != self.n_tokens:
            return None
        past = self.past
        if not isinstance(past, int) or past > 0:
            return None
        numbers = (torch.diff(positions, dim=-1, prepend=positions[:, :1] - 1) != 1).cumsum(-1)
        cached = self.cache is not None or self.makes_cache
        if cached and not torch.compiler.is_compiling() and bool(numbers[:, -1].any()):
            raise ValueError(
                "position_ids: they mark several sequences in one row, but transformers separates these only "
                "without a KV cache; pass use_cache=False, or a mask and padded rows"
            )
        return numbers

    def refuse_unknown_arguments(self) -> None:
        """Raise a ValueError for an unknown argument that may say where tokens stand."""
        for name, value in self.values.items():
            if value is None or isinstance(value, bool | int | float | str) or is_cache(value):
                continue
            if _carried(name, value):
                raise ValueError(
                    f"{name}: got a {type(value).__name__}, expected a cache that knows its length "
                    "(get_seq_length()): positions cannot be told from this one"
                )
            if name in _PER_TOKEN or _OTHER_SENSES.search(name):
                continue
            for tensor in (value,) if isinstance(value, Tensor) else _tensors_of(value):
                if self._per_token(tensor):
                    raise ValueError(
                        f"{name}: unknown argument ({tensor.dtype} {tuple(tensor.shape)}) that could be a mask or "
                        "token positions; with positions=, pass attention_mask and position_ids instead"
                    )

    def _per_token(self, tensor: Tensor) -> bool:
        """Whether a tensor has a number per token, [B, S] or [1, S], or per pair of tokens, [..., T, S]."""
        if tensor.dim() == 2:
            return tensor.shape[0] in (1, self.n_rows) and tensor.shape[1] >= self.n_tokens
        pairs = tensor.dim() == 4 and tensor.shape[2] == self.n_tokens and tensor.shape[3] >= self.n_tokens
        return pairs and tensor.shape[0] in (1, self.n_rows)


def read_call(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """The call of a forward pass.

    Args:
        names: the decoder's positional arguments.
        args, kwargs: what it was called with.

    Raises:
        ValueError: no tokens, or more positional arguments than there are names.
    """
    values = kwargs
    if args:
        if len(args) > len(names):
            raise ValueError(f"got {len(args)} positional arguments, expected at most {len(names)}: their names matter")
        values = named(names, args, kwargs)
    tokens = values.get("input_ids")
    if tokens is None:
        tokens = values.get("inputs_embeds")
    if not isinstance(tokens, Tensor) or tokens.dim() < 2:
        raise ValueError("input_ids, inputs_embeds: got neither as a tensor [B, T, ...], expected one of them")
    return Call(values, tokens)


def cache_among(values: dict[str, Any]) -> Any:
    """The KV cache among named values, or None; from an encoder-decoder cache, the decoder's own half.

    Raises:
        ValueError: several caches.
    """
    found: list[Any] = []
    for value in values.values():
        if is_cache(value):
            own = getattr(value, "self_attention_cache", value)
            if not any(own is other for other in found):
                found.append(own)
    if len(found) > 1:
        kinds = ", ".join(type(cache).__name__ for cache in found)
        raise ValueError(f"got {len(found)} different caches ({kinds}), expected one")
    return found[0] if found else None


def is_cache(value: Any) -> bool:
    """Whether a value is a KV cache that knows its length."""
    return not isinstance(value, Tensor | dict | tuple | list) and callable(getattr(value, "get_seq_length", None))


def _is_flat(mask: Any) -> bool:
    return isinstance(mask, Tensor) and mask.dim() == 2


def _tensors_of(value: Any) -> list[Tensor]:
    """The tensors in a list, tuple or dictionary."""
    items = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ()
    return [item for item in items if isinstance(item, Tensor)]


def _carried(name: str, value: Any) -> bool:
    """Whether a value looks like something that one pass hands to the next, although it is no known cache."""
    if isinstance(value, tuple | list):
        nested = any(isinstance(item, tuple | list) and any(isinstance(t, Tensor) for t in item) for item in value)
        return nested or bool(_CARRIED.search(name) and not _NOT_CARRIED.search(name))
    if isinstance(value, Tensor):
        return False
    kind = type(value)
    own = kind.__module__.partition(".")[0] not in ("builtins", "torch", "numpy", "collections")
    return own and bool(re.search(r"cache|state|mem", kind.__name__, re.IGNORECASE) or _CARRIED.search(name))
