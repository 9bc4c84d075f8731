"""Distillation in transformers' `Trainer`: the steps of F.kl_div, taken from logits and from hidden states."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from op_cases import Inputs
from tiny import WORDS, llama
from torch import Tensor
from transformers import Trainer, TrainingArguments

import actscale_fast as af

TEMPERATURE = 2.0
IGNORED = -100
Loss = Callable[[Any, Any, dict[str, Tensor], Tensor, Any], Tensor]


def plain(student: Any, teacher: Any, inputs: dict[str, Tensor], labels: Tensor, n_tokens: Any) -> Tensor:
    """As one writes it with PyTorch."""
    kept = labels != IGNORED
    log_q, log_p = ((model(**inputs).logits / TEMPERATURE).log_softmax(-1)[kept] for model in (student, teacher))
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True) * TEMPERATURE**2 / n_tokens


def from_logits(student: Any, teacher: Any, inputs: dict[str, Tensor], labels: Tensor, n_tokens: Any) -> Tensor:
    return af.ops.kl_div_from_logits(
        student(**inputs).logits, teacher(**inputs).logits.detach(), temperature=TEMPERATURE, labels=labels,
        row_weight=TEMPERATURE**2 / n_tokens, reduction="sum",
    )  # fmt: skip


def from_hidden_states(student: Any, teacher: Any, inputs: dict[str, Tensor], labels: Tensor, n_tokens: Any) -> Tensor:
    hidden, other = (model.model(**inputs).last_hidden_state for model in (student, teacher))
    return af.ops.linear_kl_div(
        hidden, student.lm_head.weight, other.detach(), teacher.lm_head.weight, temperature=TEMPERATURE, labels=labels,
        row_weight=TEMPERATURE**2 / n_tokens, reduction="sum", chunk_bytes=5000,
    )  # fmt: skip


class DistillationTrainer(Trainer):
    """A student learns its teacher's next tokens, where there are labels."""

    def __init__(self, *args: Any, teacher: Any, loss: Loss, **options: Any) -> None:
        super().__init__(*args, **options)
        self.teacher, self.loss = teacher.requires_grad_(False), loss
        self.losses: list[float] = []

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = F.pad(inputs["labels"], (0, 1), value=IGNORED)[:, 1:]  # of the token that follows
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
        loss = self.loss(model, self.teacher, inputs, labels, num_items_in_batch)
        self.losses.append(float(loss.detach()))
        return (loss, None) if return_outputs else loss


def sentences(inputs: Inputs) -> list[dict[str, list[int]]]:
    """Sixteen of 6 to 12 tokens, padded to 12; prompts and padding have no labels."""
    rows = []
    for length in (6 + inputs.integers(7, 16)).tolist():
        tokens = (3 + inputs.integers(len(WORDS) - 3, length)).tolist()
        labels = [IGNORED] * 3 + tokens[3:]
        padding = 12 - length
        rows.append({
            "input_ids": tokens + [1] * padding, "attention_mask": [1] * length + [0] * padding,
            "labels": labels + [IGNORED] * padding,
        })  # fmt: skip
    return rows


def trained(loss: Loss, rows: list[dict[str, list[int]]], folder: Path) -> tuple[list[float], dict[str, Tensor]]:
    """Each micro-batch's loss, and the student's parameters after four steps of two micro-batches."""
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=4, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=0.05, optim="sgd", lr_scheduler_type="constant", use_cpu=True, report_to=[], save_strategy="no",
        disable_tqdm=True, logging_strategy="no", seed=0, dataloader_pin_memory=False,
    )  # fmt: skip
    student = llama(1)
    trainer = DistillationTrainer(student, arguments, train_dataset=rows, teacher=llama(0), loss=loss)  # type: ignore[arg-type]
    trainer.train()
    return trainer.losses, {name: value.detach() for name, value in student.named_parameters()}


@pytest.fixture
def rows(inputs: Inputs) -> list[dict[str, list[int]]]:
    return sentences(inputs)


@pytest.mark.parametrize("loss", [from_logits, from_hidden_states])
def test_a_trainer_takes_the_steps_that_it_takes_with_kl_div(
    loss: Loss, rows: list[dict[str, list[int]]], tmp_path: Path
) -> None:
    losses, parameters = trained(loss, rows, tmp_path)
    expected_losses, expected = trained(plain, rows, tmp_path)
    start = dict(llama(1).named_parameters())
    assert len(losses) == 8
    assert all(math.isfinite(value) for value in losses)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected_losses), rtol=2e-5, atol=1e-6)
    for name, value in expected.items():
        way = (value - start[name]).norm()
        assert way > 0
        assert (parameters[name] - value).norm() <= 1e-4 * way + 1e-6, name


@pytest.mark.parametrize("loss", [from_logits, from_hidden_states])
def test_every_parameter_gets_the_gradient_of_kl_div(loss: Loss, rows: list[dict[str, list[int]]]) -> None:
    batch = {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "attention_mask")}
    labels = torch.tensor([row["labels"] for row in rows])
    student, teacher = llama(1), llama(0)
    results = []
    for function in (plain, loss):
        student.zero_grad()
        value = function(student, teacher, batch, labels, torch.tensor(50))
        value.backward()
        results.append((value.detach(), {name: p.grad.clone() for name, p in student.named_parameters()}))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=1e-6)
    for name, expected in results[0][1].items():
        assert (results[1][1][name] - expected).norm() <= 1e-4 * expected.norm(), name
