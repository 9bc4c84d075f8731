"""MIB's circuit metrics for scores of heads: CPR and CMD (arXiv 2504.13151, the circuit track).

A circuit C(p) keeps the p % of the heads with the largest scores; all other heads are ablated. With m the mean logit
difference, M the whole model and ∅ the circuit without heads,

    f(p) = (m(C(p)) − m(∅)) / (m(M) − m(∅))        faithfulness
    CPR  = ∫ f(p) dp        CMD = ∫ |1 − f(p)| dp        trapezoids over p/100 from 0.001 to 1

CPR is better when it is larger, CMD when it is closer to 0. The thresholds, the rounding (down) and the integrals are
those of the track's code.

Our reading: nodes are attention heads alone, so that MLPs belong to every circuit, ∅ included; the track's own graphs
have nodes for MLPs and the input too, and its ∅ is the run on the counterfactual prompt.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..._json import write_json
from ..._tables import Readable
from ...architectures.layout import layout
from ...tasks.loading import ExampleSource, examples_from
from .circuits import Ablation, check_ablation, circuit_differences
from .selection import HeadSelection
from .subject import Subject

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: The track's circuit sizes, in per cent of the nodes.
PERCENTAGES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)


@dataclass(frozen=True, slots=True, repr=False)
class CircuitMetrics(Readable):
    """The result of `circuit_metrics`."""

    cpr: float  #: area under the faithfulness; larger is better
    cmd: float  #: area between the faithfulness and 1; 0 is best
    percentages: tuple[float, ...] = field(repr=False)
    n_heads: tuple[int, ...] = field(repr=False)  #: heads in each circuit
    faithfulness: tuple[float, ...] = field(repr=False)
    full: float  #: mean logit difference of the whole model
    empty: float  #: that without any head
    ablation: str
    n_examples: int

    def table(self) -> tuple[list[str], list[list[str]]]:
        """(column names, rows) as text: the faithfulness of each circuit."""
        rows = [
            [f"{percent:g}", str(count), f"{value:.3f}"]
            for percent, count, value in zip(self.percentages, self.n_heads, self.faithfulness, strict=True)
        ]
        return ["% of heads", "heads", "faithfulness"], rows

    def _heading(self) -> str:
        return f"CPR {self.cpr:.3f}, CMD {self.cmd:.3f} ({self.ablation} ablation, {self.n_examples} prompts)"

    def _notes(self) -> list[str]:
        return [f"mean logit difference: {self.full:+.2f} with all heads, {self.empty:+.2f} without"]

    def to_dict(self) -> dict[str, Any]:
        """All fields, for JSON."""
        return asdict(self)


def circuit_metrics(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: ExampleSource,
    scores: Tensor | HeadSelection,
    *,
    layers: Sequence[int] | None = None,
    ablation: Ablation = "zero",
    absolute: bool = True,
    batch_size: int = 8,
) -> CircuitMetrics:
    """Judge scores of heads as MIB's circuit track does: how much of the task do the best p % of the heads keep?

    All circuits run as row groups of the same passes.

    Args:
        model, tokenizer: a Hugging Face causal language model and its tokenizer.
        examples: prompts with their two answers; for "interchange" also with a source of as many tokens, the
            counterfactual prompt.
        scores: [L, H], finite, or the result of `select_heads`.
        layers: the numbers of the scored layers; None: all that have heads, or those of the selection.
        ablation: what replaces a head outside the circuit: "zero", or its activation at the same token of the source.
        absolute: whether the magnitude of the scores counts, as in the track's code.
        batch_size: the largest number of prompts in one pass; each runs once per circuit.

    Returns:
        CircuitMetrics.

    Raises:
        TypeError, ValueError: bad arguments or examples, scores of another shape, or a model whose logit difference
            does not change without heads.

    Example:
        >>> train, test = af.tasks.indirect_object_identification(tokenizer)
        >>> selection = af.select_heads(model, tokenizer, train, "attribution")
        >>> print(af.circuit_metrics(model, tokenizer, test, selection))
    """
    if isinstance(scores, HeadSelection):
        layers = scores.location.layers if layers is None else layers
        scores = scores.scores
    subject = Subject(model, tokenizer, examples_from(examples), None if layers is None else tuple(layers), batch_size)
    scores = checked_scores(scores, subject.shape)
    check_ablation(ablation)
    exists = subject.exists
    n_all = int(exists.sum())
    sizes = [int(percent / 100 * n_all + 1e-9) for percent in PERCENTAGES]
    ranked = torch.where(exists, scores.abs() if absolute else scores, -torch.inf).flatten()
    order = ranked.argsort(descending=True, stable=True)
    distinct = sorted({0, n_all, *sizes})
    kept = torch.zeros(len(distinct), scores.numel(), device="cpu")
    for group, size in enumerate(distinct):
        kept[group, order[:size]] = 1.0
    measured = circuit_differences(subject, kept.view(len(distinct), *scores.shape), ablation).mean(1).tolist()
    value_of = dict(zip(distinct, measured, strict=True))
    full, empty = value_of[n_all], value_of[0]
    if not abs(full - empty) > 1e-12 * max(abs(full), abs(empty), 1e-300):
        raise ValueError(f"examples: the mean logit difference is {full:.4g} with all heads and without any")
    faithfulness = [(value_of[size] - empty) / (full - empty) for size in sizes]
    shares = [percent / 100 for percent in PERCENTAGES]
    cpr = _area(shares, faithfulness)
    cmd = _area(shares, [abs(1 - value) for value in faithfulness])
    return CircuitMetrics(
        cpr, cmd, PERCENTAGES, tuple(sizes), tuple(faithfulness), full, empty, ablation, len(subject.data)
    )


def save_mib_scores(
    path: str | os.PathLike[str],
    model: PreTrainedModel,
    scores: Tensor | HeadSelection,
    *,
    layers: Sequence[int] | None = None,
    parallel: bool = False,
) -> None:
    """Write scores of heads as a JSON file of MIB's circuit track, with one importance per node.

    Nodes without a score (the input, MLPs, and layers that were not scored) have none in the file either: the track's
    code keeps them in every circuit at `--level node`.

    Args:
        path: the file.
        model: the model that was scored.
        scores, layers: as in `circuit_metrics`.
        parallel: whether attention and MLP of a layer read the same input, as in GPT-NeoX.

    Raises:
        TypeError, ValueError: layers that the model does not have or that have no heads, or scores of another shape.
    """
    found = layout(model)
    if isinstance(scores, HeadSelection):
        layers = scores.location.layers if layers is None else layers
        scores = scores.scores
    numbers = found.location("head", layers).layers
    scores = checked_scores(scores, (len(numbers), found.n_heads))
    index_of = {layer: index for index, layer in enumerate(numbers)}
    nodes: dict[str, dict[str, Any]] = {"input": {"in_graph": True}}
    for layer in range(found.n_layers):
        for head in range(found.n_heads):
            node: dict[str, Any] = {"in_graph": True}
            if layer in index_of:
                node["score"] = float(scores[index_of[layer], head])
            nodes[f"a{layer}.h{head}"] = node
        nodes[f"m{layer}"] = {"in_graph": True}
    nodes["logits"] = {"in_graph": True}
    sizes = {"n_layers": found.n_layers, "n_heads": found.n_heads, "parallel_attn_mlp": parallel}
    write_json(path, {"cfg": sizes | {"d_model": found.hidden_size}, "nodes": nodes, "edges": {}})


def checked_scores(scores: Any, shape: tuple[int, int]) -> Tensor:
    """The scores on the CPU, if they are finite and have this shape."""
    if not isinstance(scores, Tensor):
        raise TypeError(f"scores: got {type(scores).__name__}, expected a tensor [L, H] or a HeadSelection")
    if scores.shape != shape or not bool(scores.isfinite().all()):
        raise ValueError(f"scores: got shape {tuple(scores.shape)}, expected finite values [L, H] = {list(shape)}")
    return scores.detach().float().cpu()


def _area(x: Sequence[float], y: Sequence[float]) -> float:
    """The trapezoid rule."""
    return math.fsum((x[i + 1] - x[i]) * (y[i + 1] + y[i]) / 2 for i in range(len(x) - 1))
