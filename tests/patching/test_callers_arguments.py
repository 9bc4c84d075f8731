"""Nothing is read from another library's call by a name that may change: caches, masks, packed rows, prompts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from model_zoo import OTHER, PROMPT, scalars, tiny_model
from torch import Tensor, nn
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

import actscale_fast as af
from actscale_fast.architectures.arguments import cache_argument
from actscale_fast.architectures.layout import layout as layout_of
from actscale_fast.patching.forward_call import read_call


def logits_of(model: nn.Module, ids: Tensor, intervention: Any, **arguments: Any) -> Tensor:
    with torch.no_grad(), af.patch(model, intervention):
        return model(ids, use_cache=False, **arguments).logits


# --- caches, under whatever name -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["past_key_values", "cache", "kv_store", "memory"])
def test_a_cache_is_found_by_its_type_under_any_name(name: str) -> None:
    model = tiny_model()
    cache = DynamicCache(config=model.config)
    model(PROMPT, **{cache_argument(model): cache, "use_cache": True})
    call = read_call(("input_ids",), (PROMPT,), {name: cache})
    assert call.cache is cache
    assert call.past == 5


@pytest.mark.parametrize("family", ["llama", "opt", "gemma3_text"])
def test_a_decoder_that_renames_its_cache_is_steered_as_before(family: str) -> None:
    model = tiny_model(family)
    intervention = scalars(model, positions=[-1, 0], generated=True)
    with torch.no_grad(), af.patch(model, intervention):
        expected = model.generate(PROMPT, max_new_tokens=6, do_sample=False)
    layout = layout_of(model)
    name, inner = cache_argument(layout.decoder), type(layout.decoder).forward
    assert name is not None

    class Renamed(type(layout.decoder)):  # type: ignore[misc]
        def forward(self, *args: Any, kv_store: Any = None, **kwargs: Any) -> Any:
            return inner(self, *args, **{**kwargs, name: kv_store})

    layout.decoder.__class__ = Renamed

    def renaming(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return args, {("kv_store" if key == name else key): value for key, value in kwargs.items()}

    layout.decoder.register_forward_pre_hook(renaming, with_kwargs=True)
    with torch.no_grad(), af.patch(model, intervention):
        found = model.generate(PROMPT, max_new_tokens=6, do_sample=False)
    assert torch.equal(found, expected)


class Unknown:
    """A cache that does not say how long it is."""


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("past_key_values", ((torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8)),) * 2),
        ("kv", [[torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8)]]),
        ("mems", [torch.zeros(3, 1, 32)]),
        ("cache", Unknown()),
    ],
)
def test_what_may_be_a_cache_of_unknown_length_is_refused_with_positions(name: str, value: Any) -> None:
    call = read_call(("input_ids",), (PROMPT,), {name: value})
    with pytest.raises(ValueError, match=rf"{name}: got a \w+, expected a cache that knows its length"):
        call.refuse_unknown_arguments()


@pytest.mark.parametrize("name", ["padding_mask", "valid", "segment_ids"])
def test_what_may_be_a_mask_under_an_unknown_name_is_refused_with_positions(name: str) -> None:
    call = read_call(("input_ids",), (PROMPT,), {name: torch.ones(1, 5, dtype=torch.int64)})
    with pytest.raises(ValueError, match=rf"{name}: unknown argument \(torch.int64 \(1, 5\)\) that could be a mask"):
        call.refuse_unknown_arguments()


def test_two_different_caches_are_refused() -> None:
    call = read_call((), (), {"input_ids": PROMPT, "cache": DynamicCache(), "other": DynamicCache()})
    with pytest.raises(ValueError, match="got 2 different caches"):
        _ = call.cache


def test_positional_arguments_without_names_are_refused() -> None:
    with pytest.raises(ValueError, match="got 2 positional arguments, expected at most 1"):
        read_call(("input_ids",), (PROMPT, PROMPT), {})


@pytest.mark.parametrize("kind", [tuple, list])
def test_a_layers_output_is_edited_as_a_tuple_and_as_a_list(kind: type) -> None:
    model = tiny_model("llama")
    intervention = scalars(model, site="residual", layers=[0])
    expected = logits_of(model, PROMPT, intervention)
    layer = model.model.layers[0]
    inner, following = type(layer).forward, type(model.model.layers[1]).forward

    class Several(type(layer)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return kind([inner(self, *args, **kwargs), None])

    class Takes(type(layer)):  # type: ignore[misc]
        def forward(self, hidden: Any, *args: Any, **kwargs: Any) -> Any:
            return following(self, hidden[0], *args, **kwargs)

    layer.__class__ = Several
    model.model.layers[1].__class__ = Takes
    assert torch.equal(logits_of(model, PROMPT, intervention), expected)


# --- packed rows ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", [[0], [-1], [0, -2]])
def test_sequences_that_position_ids_tell_apart_are_prompts_of_their_own(positions: list[int]) -> None:
    model = tiny_model(dtype=torch.float64)
    intervention = scalars(model, positions=positions)
    packed = torch.cat([PROMPT, OTHER], 1)
    found = logits_of(model, packed, intervention, position_ids=torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]]))
    apart = torch.cat([logits_of(model, PROMPT, intervention), logits_of(model, OTHER, intervention)], 1)
    torch.testing.assert_close(found, apart, rtol=1e-9, atol=1e-9)


def test_position_ids_of_one_sequence_per_row_change_nothing() -> None:
    model = tiny_model(dtype=torch.float64)
    intervention = scalars(model, positions=[1, -1])
    expected = logits_of(model, PROMPT, intervention)
    torch.testing.assert_close(logits_of(model, PROMPT, intervention, position_ids=torch.arange(5)[None]), expected)


@pytest.mark.parametrize("what", ["strength", "group", "mask"])
def test_one_value_per_row_is_refused_where_a_row_holds_several_sequences(what: str) -> None:
    model = tiny_model()
    packed, places = torch.cat([PROMPT, OTHER], 1), torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]])
    one = scalars(model)
    applied = {
        "strength": lambda: af.patch(model, one, strength=torch.tensor([0.5])),
        "group": lambda: af.patch(model, af.ActivScalar.stack([one, one]), group=torch.tensor([1])),
        "mask": lambda: af.head_mask(model, torch.ones(2, 2, 4)),
    }
    batch = (packed.repeat(2, 1), places.repeat(2, 1)) if what == "mask" else (packed, places)
    with (
        torch.no_grad(),
        applied[what](),
        pytest.raises(ValueError, match="position_ids mark several sequences in one row"),
    ):
        model(batch[0], position_ids=batch[1], use_cache=False)


# --- prompts belong to sequences -----------------------------------------------------------------------------------


class Asking(LogitsProcessor):
    """Asks the same model about another sequence at every step, and notes what it says."""

    def __init__(self, model: nn.Module, use_cache: bool) -> None:
        self.model, self.said, self.use_cache = model, [], use_cache

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.said.append(self.model(OTHER, use_cache=self.use_cache).logits)
        return scores


class AskingToStop(StoppingCriteria):
    def __init__(self, asking: Asking) -> None:
        self.asking = asking

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        self.asking(input_ids, scores)
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("asked_by", ["logits_processor", "stopping_criteria"])
@pytest.mark.parametrize("cached", [True, False])
def test_what_is_asked_of_the_model_during_generate_has_a_prompt_of_its_own(
    asked_by: str, use_cache: bool, cached: bool
) -> None:
    model = tiny_model(dtype=torch.float64)
    intervention = scalars(model, positions=[-1], generated=True)
    asking = Asking(model, use_cache)
    askers: dict[str, dict[str, Any]] = {
        "logits_processor": {"logits_processor": LogitsProcessorList([asking])},
        "stopping_criteria": {"stopping_criteria": StoppingCriteriaList([AskingToStop(asking)])},
    }
    asked = askers[asked_by]
    options = {"max_new_tokens": 4, "do_sample": False, "use_cache": cached}
    with torch.no_grad(), af.patch(model, intervention):
        expected = model(OTHER, use_cache=False).logits
        plain = model.generate(PROMPT, **options)
        found = model.generate(PROMPT, **options, **asked)
    assert torch.equal(found, plain)
    for said in asking.said:
        torch.testing.assert_close(said, expected, rtol=1e-9, atol=1e-9)


def guided_by_hand(model: nn.Module, intervention: Any, negative: Tensor, scale: float, steps: int) -> Tensor:
    """Classifier-free guidance from whole passes, each sequence with its own prompt."""
    ids, other = PROMPT, negative
    with torch.no_grad(), af.patch(model, intervention) as applied:
        for _ in range(steps):
            with applied.prompt(PROMPT.shape[1]):
                told = model(ids, use_cache=False).logits[:, -1].log_softmax(-1)
            with applied.prompt(negative.shape[1]):
                untold = model(other, use_cache=False).logits[:, -1].log_softmax(-1)
            token = (scale * (told - untold) + untold).argmax(-1, keepdim=True)
            ids, other = torch.cat([ids, token], 1), torch.cat([other, token], 1)
    return ids


@pytest.mark.parametrize("positions", [[0, -1], [2]])
def test_guidance_steers_each_of_its_two_sequences_by_its_own_prompt(positions: list[int]) -> None:
    model = tiny_model(dtype=torch.float64)
    intervention = scalars(model, positions=positions, generated=True)
    with torch.no_grad(), af.patch(model, intervention):
        found = model.generate(
            PROMPT, negative_prompt_ids=OTHER, guidance_scale=3.0, max_new_tokens=6, do_sample=False, eos_token_id=None
        )
    assert torch.equal(found, guided_by_hand(model, intervention, OTHER, 3.0, 6))


def test_guidance_without_a_cache_is_refused_with_positions() -> None:
    model = tiny_model()
    with (
        torch.no_grad(),
        af.patch(model, scalars(model, positions=[-1])),
        pytest.raises(ValueError, match="use_cache: got False with guidance_scale"),
    ):
        model.generate(PROMPT, negative_prompt_ids=OTHER, guidance_scale=3.0, max_new_tokens=2, use_cache=False)


@pytest.mark.parametrize("early", [True, False])
def test_assisted_decoding_gives_the_tokens_of_plain_decoding(early: bool) -> None:
    model = tiny_model(num_hidden_layers=3)
    intervention = scalars(model, positions=[-1, 1], generated=True)
    draft = {"assistant_early_exit": 1} if early else {"prompt_lookup_num_tokens": 2}
    try:
        model.generate(PROMPT, max_new_tokens=6, do_sample=False, **draft)
    except TypeError as error:
        pytest.skip(f"transformers {transformers.__version__} cannot do it by itself: {error}")
    with torch.no_grad(), af.patch(model, intervention):
        plain = model.generate(PROMPT, max_new_tokens=6, do_sample=False)
        assert torch.equal(model.generate(PROMPT, max_new_tokens=6, do_sample=False, **draft), plain)


def test_a_filled_cache_handed_to_generate_is_of_its_sequence() -> None:
    model = tiny_model()
    intervention = scalars(model, positions=[-1], generated=True)
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), af.patch(model, intervention) as applied:
        whole = model.generate(PROMPT, max_new_tokens=4, do_sample=False)
        with applied.prompt(PROMPT.shape[1]):
            model(PROMPT[:, :3], **{cache_argument(model): cache, "use_cache": True})
        kept = {"past_key_values" if cache_argument(model) != "cache" else "cache": cache}
        assert torch.equal(model.generate(PROMPT, max_new_tokens=4, do_sample=False, **kept), whole)


def test_a_forward_that_is_replaced_after_the_first_patch_is_read_by_its_own_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model()
    intervention = scalars(model, positions=[0])
    mask = torch.ones_like(PROMPT)
    mask[:, :2] = 0
    with torch.no_grad(), af.patch(model, intervention):
        expected = model.model(input_ids=PROMPT, attention_mask=mask, use_cache=False)[0]
    cls: Any = type(model.model)
    inner = cls.forward

    def mask_first(self: Any, attention_mask: Any = None, input_ids: Any = None, **kwargs: Any) -> Any:
        return inner(self, input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    monkeypatch.setattr(cls, "forward", mask_first)
    with torch.no_grad(), af.patch(model, intervention):
        found = model.model(mask, PROMPT, use_cache=False)[0]
    assert torch.equal(found, expected)
