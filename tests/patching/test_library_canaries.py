"""What the package relies on inside other libraries: each test names the file to change when a new version fails it."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
import transformers
from model_zoo import checkpoint_activations, tiny_model
from torch import nn

from actscale_fast.modules.hooks import HOOKS
from actscale_fast.patching.announced_prompt import _GENERATE


def test_torch_keeps_hooks_in_the_attributes_that_are_copied_and_disabled() -> None:
    found = [name for name in vars(nn.Linear(1, 1)) if name.startswith("_forward") and "hooks" in name]
    assert sorted(found) == sorted(HOOKS), (
        "PyTorch has other attributes for forward hooks; see HOOKS in modules/hooks.py"
    )


def test_torch_compile_does_not_guard_hooks() -> None:
    assert torch._dynamo.config.skip_nnmodule_hook_guards, (
        "torch.compile guards hooks by default now; modules/hooks.py may no longer need to swap a module's class"
    )


def test_transformers_calls_checkpointed_layers_through_an_attribute() -> None:
    model = tiny_model("llama").train()
    checkpoint_activations(model, reentrant=False)
    assert "_gradient_checkpointing_func" in vars(model.model.layers[0]), (
        "transformers checkpoints a layer in another way; see patching/checkpointing.py"
    )


def test_generate_stands_in_the_file_that_is_looked_for_on_the_stack() -> None:
    file = inspect.getfile(inspect.unwrap(transformers.GenerationMixin.generate))
    assert file.endswith(_GENERATE), f"generate() moved to {file}; see patching/announced_prompt.py"


def test_a_cache_layer_begins_with_keys_and_values() -> None:
    from transformers.cache_utils import DynamicLayer

    parameters = list(inspect.signature(DynamicLayer.lazy_initialization).parameters)
    update = list(inspect.signature(DynamicLayer.update).parameters)
    assert (parameters[1:3], update[1:3]) == (["key_states", "value_states"],) * 2, (
        "transformers' cache layers changed; see PrefixLayer in frozen/partial_forward.py"
    )


def test_accelerates_hook_is_an_attribute_of_the_module() -> None:
    text = Path(inspect.getfile(pytest.importorskip("accelerate.hooks"))).read_text(encoding="utf-8")
    missing = [part for part in ("module._hf_hook = hook", "execution_device") if part not in text]
    assert not missing, f"accelerate lacks {missing}; see execution_device in architectures/hugging_face.py"
