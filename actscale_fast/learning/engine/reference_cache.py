"""What the frozen model computes for each example, once and when it is first used: references, and what is constant."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ... import ops
from ...architectures.hugging_face import embedding_weight
from ...architectures.layout import ModelLayout
from ...architectures.lm_head import OutputHead
from ...architectures.sharding import model_processes
from ...frozen.batching import Batch, forward_arguments
from ...frozen.partial_forward import PartialForward, Prefix, cache_arguments, keys_and_values
from ...patching.patch import AnyPatch
from ..encoded_examples import EncodedExamples
from ..objective import KLOptions
from .active_region import ActiveRegion
from .row_store import RowStore, right_aligned

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: The most prompts, and the most tokens, in one pass of the frozen model; a single prompt may have more.
REFERENCE_ROWS, REFERENCE_TOKENS = 32, 1 << 13
#: How the names of what is constant begin.
_CONSTANT = ("hidden", "keys.", "values.")
#: Prompts that are used one soon after another, among which those of similar length share a pass.
_WINDOW = 128


def reference_passes(data: EncodedExamples, stages: Sequence[Sequence[int]] | None = None) -> list[list[int]]:
    """The rows of each pass of the frozen model, in the order of their probable use; every row is in one pass.

    A row always runs in the same company, whenever it is first used, so that rounding is the same after a resumption.

    Args:
        data: the examples.
        stages: rows in the order in which they will probably be used; those that are missing come last.
    """
    rows: list[list[int]] = [list(stage) for stage in stages or ()]
    if len(data) > _WINDOW:
        rows.insert(0, _looked_at(data))
    passes: list[list[int]] = []
    done: set[int] = set()
    for stage in [*rows, list(range(len(data)))] if len(data) > _WINDOW else [list(range(len(data)))]:
        left = [row for row in dict.fromkeys(stage) if row not in done]
        done.update(left)
        for start in range(0, len(left), _WINDOW):
            for alike in data.by_length(REFERENCE_ROWS, left[start : start + _WINDOW]):
                most = max(REFERENCE_TOKENS // max(len(data.prompts[row]) for row in alike), 1)
                passes += [alike[first : first + most] for first in range(0, len(alike), most)]
    return passes


def _looked_at(data: EncodedExamples) -> list[int]:
    """The rows that are looked at whenever an engine opens: of each kind the shortest and the longest."""
    found: list[int] = []
    for long in (False, True):
        order = [row for row in range(len(data)) if (row in data.long_answers) is long]
        order.sort(key=lambda row: len(data.prompts[row]))
        longer = [row for row in order if len(data.prompts[row]) > len(data.prompts[order[0]])]
        found += order[:3] + longer[:1] + order[-1:]
    return found


class ReferenceCache:
    """The frozen model's predictions for each example, and the part of its computation that no step changes.

    Both are computed when an example is first used, and kept. Of what the losses need, only a few numbers per example
    are kept outside the store; logits, where they are needed, are kept in it, as far as its budgets reach.

    Args:
        model, found: the model, plain or compiled, and its layout.
        data: the examples.
        region: what an intervention can change.
        section: the model's open partial forward pass.
        patched: the intervention's patch, which is paused while the frozen model runs.
        head: the model's head; None: logits are kept.
        store: holds what is constant.
        passes: the rows that run together, as `reference_passes` makes them; None: those of no stages.
        options: how the objectives take the KL, each once; None: no predictions are needed.
    """

    def __init__(
        self, model: PreTrainedModel, found: ModelLayout, data: EncodedExamples, region: ActiveRegion,
        section: PartialForward, patched: AnyPatch, head: OutputHead | None, store: RowStore,
        passes: Sequence[Sequence[int]] | None = None, options: Sequence[KLOptions] | None = None,
    ) -> None:  # fmt: skip
        self.model, self.found, self.data, self.region = model, found, data, region
        self.section, self.patched, self.head, self.store = section, patched, head, store
        self.dtype: torch.dtype = embedding_weight(found.model).dtype
        self.passes = reference_passes(data) if passes is None else passes
        self.options = options
        self.together = model_processes(found.model)
        self.statistics: dict[KLOptions, ops.ReferenceStatistics] = {}  # of all rows; without logits, which are kept
        self.output: Tensor | None = None  # [N, d], the head's inputs, if some answers have several tokens
        self._pass_of = {row: number for number, rows in enumerate(self.passes) for row in rows}
        self._filled: set[int] = set()
        self._with_logits: set[KLOptions] = set()  # those whose statistics need the frozen logits
        self._again: tuple[dict[int, int], dict[str, Tensor]] | None = None  # places of rows, and their values

    @property
    def keeps_rows(self) -> bool:
        """Whether anything is kept in the store."""
        return bool(self.store.near)

    def fill(self, rows: Iterable[int] | None = None) -> None:
        """Run the passes that hold these rows (None: all) and have not run yet.

        Processes that hold the model together call this with rows of their own.
        """
        numbers = range(len(self.passes)) if rows is None else sorted({self._pass_of[row] for row in rows})
        wanted = [number for number in numbers if self._must_run(number)]
        most = len(wanted) if self.together.same_rows else max(self.together.all_gather(len(wanted)))
        for number in wanted:
            self._fill(list(self.passes[number]))
            self._filled.add(number)
        for _ in range(most - len(wanted)):  # the others need this process in their passes
            self._run(self.passes[0][:1])

    def reference(self, examples: Tensor, option: KLOptions) -> ops.ReferenceStatistics | Tensor:
        """The references of the losses of these examples (int64 [R], on the host), which have been filled."""
        if self.head is None:
            return self.outputs(examples.tolist())
        known = self.statistics[option]
        found = known[examples.to(known.correct.device)]
        if option not in self._with_logits:
            return found
        return replace(found, logits=self._stored(examples.tolist(), ["logits"])["logits"])

    def outputs(self, rows: Sequence[int]) -> Tensor:
        """The frozen model's head inputs [rows, d], or logits [rows, V] if there is no head."""
        if self.head is None:
            return self._stored(rows, ["output"])["output"]
        return self._run(rows)[0]

    def frozen_output(self, examples: Tensor) -> Tensor:
        """The frozen model's head inputs [R, d] (or logits) after these prompts (int64 [R], on the host)."""
        if self.head is None:
            return self.outputs(examples.tolist())
        assert self.output is not None
        return self.output[examples.to(self.output.device)]

    def begin(self, rows: Iterable[int]) -> None:
        """Compute what is not kept of the rows of a microbatch, in one pass, whatever it asks for then.

        Processes that hold the model together so run the frozen model equally often.
        """
        missing = sorted({row for row in rows if not self.store.has_place(row)})
        self._again = None
        whole = all(row in self.data.long_answers for row in missing)
        if missing and self.keeps_rows and not (whole and all(name.startswith(_CONSTANT) for name in self.store.near)):
            self._compute_again(missing)

    def constants(self, rows: Sequence[int], columns: int) -> dict[str, Tensor]:
        """What is constant for these rows, left-padded to `columns`: "hidden", "keys.l" and "values.l"."""
        if self.region.is_whole:
            return {}
        n_prefix = max(columns - self.region.width, 0)
        cut = {}
        constant = [name for name in self.store.near if name.startswith(_CONSTANT)]
        for name, value in self._stored(rows, constant).items():
            if name == "hidden":
                cut[name] = value[:, -min(columns, self.region.width) :]
            elif n_prefix:
                cut[name] = value[:, :, -n_prefix:]
        return cut

    def hidden(self, rows: Sequence[int]) -> Tensor | None:
        """The hidden states [rows, width, d] that enter the lowest running layer, aligned at their last token."""
        return self._stored(rows, ["hidden"])["hidden"] if self.region.first_layer else None

    @torch.no_grad()
    def run_frozen(self, arguments: dict[str, Any], **options: Any) -> tuple[Tensor, dict[int, Tensor]]:
        """The section's output without the intervention."""
        self.patched.paused = True
        try:
            return self.section.run(arguments, **options)
        finally:
            self.patched.paused = False

    @torch.no_grad()
    def _run(self, rows: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """(the head's inputs or logits of these rows, what is constant for them)."""
        from transformers import DynamicCache

        region = self.region
        batch = self.data.batch(rows)
        arguments = forward_arguments(self.model, batch)
        cache = DynamicCache() if region.n_prefix else None
        if cache is not None:
            arguments |= cache_arguments(self.found.model, cache)
        first = region.first_layer
        output, noted = self.run_frozen(arguments, wanted=[first] if first else [])
        constant = {}
        if first:
            constant["hidden"] = right_aligned(noted[first], region.width, 1)
        if cache is not None:
            columns = batch.input_ids.shape[1]
            for index in range(first, self.found.n_layers):
                for name, value in zip(("keys", "values"), keys_and_values(cache, index), strict=True):
                    whole = right_aligned(value[:, :, :columns], region.longest, 2)
                    constant[f"{name}.{index}"] = whole[:, :, : region.n_prefix]
        return output, constant

    def _must_run(self, number: int) -> bool:
        """Whether a pass has not run yet, and leaves something that is kept."""
        if number in self._filled:
            return False
        useless = self.head is None and self.keeps_rows and not any(map(self.store.has_place, self.passes[number]))
        return not useless

    def _fill(self, rows: list[int]) -> None:
        """Run some rows, and keep what is to be kept."""
        values, output, statistics = self._computed(rows, self.options or ())
        index = torch.tensor(rows, device=output.device)
        if self.head is not None and self.data.long_answers:
            if self.output is None:
                self.output = output.new_zeros(len(self.data), *output.shape[1:])
            self.output[index] = output
        for option, found in statistics.items():
            if option not in self.statistics:
                self.statistics[option] = found.each(lambda tensor: tensor.new_zeros(len(self.data), *tensor.shape[1:]))
            known = self.statistics[option]
            for name in ("mean", "mean_bias", "entropy", "correct", "wrong"):
                if (whole := getattr(known, name)) is not None:
                    whole[index.to(whole.device)] = getattr(found, name)
        kept = list(range(len(rows)))
        if all(name.startswith(_CONSTANT) for name in values):
            kept = [place for place in kept if rows[place] not in self.data.long_answers]  # they run whole
        if values and kept:
            some = values if len(kept) == len(rows) else {name: value[kept] for name, value in values.items()}
            self.store.put([rows[place] for place in kept], some)

    @torch.no_grad()
    def _computed(
        self, rows: Sequence[int], options: Iterable[KLOptions]
    ) -> tuple[dict[str, Tensor], Tensor, dict[KLOptions, ops.ReferenceStatistics]]:
        """(what is kept in the store, the head's inputs or logits, the statistics of each option without logits)."""
        output, values = self._run(rows)
        statistics: dict[KLOptions, ops.ReferenceStatistics] = {}
        if self.head is None:
            return values | ({} if self.options is None else {"output": output}), output, statistics
        correct, wrong = (ids[list(rows)].to(output.device) for ids in (self.data.correct, self.data.wrong))
        for option in options:
            found = self.head.reference_statistics(output, correct, wrong, **option._asdict())
            if found.logits is not None:  # the same for every option
                self._with_logits.add(option)
                values = values | {"logits": found.logits}
                found = replace(found, logits=None)
            statistics[option] = found
        return values, output, statistics

    def _stored(self, rows: Sequence[int], names: Sequence[str]) -> dict[str, Tensor]:
        return self.store.get(rows, self._computed_again, names)

    def _computed_again(self, rows: list[int]) -> dict[str, Tensor]:
        """What the store does not hold of these rows."""
        places, values = self._again or ({}, {})
        if not places.keys() >= set(rows):
            places, values = self._compute_again(rows)
        index = [places[row] for row in rows]
        return {name: value[index] for name, value in values.items()}

    def _compute_again(self, rows: list[int]) -> tuple[dict[int, int], dict[str, Tensor]]:
        values, _, _ = self._computed(rows, sorted(self._with_logits)[:1])
        self._again = {row: place for place, row in enumerate(rows)}, values
        return self._again


def prefix_of(constant: dict[str, Tensor], first: int, n_layers: int, batch: Batch, width: int) -> Prefix | None:
    """The keys and values of a batch's columns before the last `width`, for the layers from `first` on.

    Args:
        constant: "keys.l" and "values.l" of these layers; not needed if all columns run, where the result is None.
        first, n_layers: the lowest layer that runs, and the model's number of layers.
        batch: the whole batch.
        width: number of columns that run.
    """
    n_prefix = batch.input_ids.shape[1] - width
    if n_prefix <= 0:
        return None
    layers = [(constant[f"keys.{index}"], constant[f"values.{index}"]) for index in range(first, n_layers)]
    return Prefix(first, layers, len(batch), n_prefix, batch.input_ids.device)
