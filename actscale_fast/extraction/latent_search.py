"""The search for latent steering vectors: Adam on many sentences at once, each with its own vector.

z* = argmin_z −Σ_t log p(x_t | x_<t, z) under teacher forcing, where z is added to the residual stream after one layer.
The sentences are rows of one batch. A sentence leaves the batch when every token is the model's first choice, because
greedy decoding then gives it. Layers up to the steered one do not depend on z and run once.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any, Self

import torch
from torch import Tensor

from ..architectures import site_check
from ..architectures.layout import ModelLayout
from ..architectures.lm_head import OutputHead
from ..architectures.location import Location
from ..architectures.sharding import fsdp_mesh
from ..frozen.batching import Batch, forward_arguments
from ..frozen.encoder import TextEncoder
from ..frozen.partial_forward import PartialForward
from ..frozen.shortcuts import open_frozen_model
from ..interventions import SteerVec
from ..patching.patch import patch

#: Required lead of a token over the second best, in logits: decoding with a cache rounds differently.
_LEAD = 0.05


class LatentSearch:
    """The optimisation of a batch of sentences; a context manager that keeps the model opened."""

    def __init__(
        self, found: ModelLayout, location: Location, opening: list[int], targets: list[list[int]], encoder: TextEncoder
    ) -> None:
        width = len(opening) + max(map(len, targets)) - 1
        inputs = [(opening + ids)[:-1] for ids in targets]
        # Padded on the right, where padding affects none of the sentence's tokens.
        ids = [row + [encoder.pad_id] * (width - len(row)) for row in inputs]
        wanted = [[-1] * (len(opening) - 1) + row + [-1] * (width - len(opening) + 1 - len(row)) for row in targets]
        self.found, self.first = found, location.layers[0] + 1
        self.ids = torch.tensor(ids, device=encoder.device)
        self.wanted = torch.tensor(wanted, device=encoder.device)  # [N, T], −1: nothing
        self.z = SteerVec(location, n_groups=len(targets), device=encoder.device)  # [N, 1, 1, 1, d]
        self.best = self.z.vectors.detach().clone()
        self.losses = [math.inf] * len(targets)
        self.taken = [0] * len(targets)
        self.solved = [False] * len(targets)

    @property
    def n_solved(self) -> int:
        return sum(self.solved)

    def vectors(self) -> list[SteerVec]:
        """The best vector of each sentence."""
        made = []
        for values in self.best:
            one = SteerVec(self.z.location, device=values.device)
            with torch.no_grad():
                one.vectors.copy_(values)
            made.append(one)
        return made

    def __enter__(self) -> Self:
        model: Any = self.found.model
        one = Batch(self.ids[:, :1], torch.ones_like(self.ids[:, :1]), padded=False)
        if fsdp_mesh(model) is not None:  # it takes the first module that runs for the root of what it shards
            with torch.no_grad():
                model(**forward_arguments(model, one))
        site_check.require_site(
            self.found, self.z.location.site, self.z.location.layers, now=True
        )  # all layers run yet
        with contextlib.ExitStack() as stack:
            head, section = stack.enter_context(open_frozen_model(self.found, model, forward_arguments(model, one)))
            self.head: OutputHead | None = head
            self.section: PartialForward = section
            with torch.no_grad():
                section.run(forward_arguments(model, one))
                self.hidden = section.run(self._arguments(self.ids), end=self.first)[0]  # [N, T, d]
            self._open = stack.pop_all()
        real = self.wanted >= 0
        size = self.hidden[real.to(self.hidden.device)].double().square().mean(-1).sqrt()
        self.size = float(size.median()) or 1.0
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.__exit__(*error)

    def start(self, scale: float, generator: torch.Generator) -> None:
        """Set every z to normal noise of `scale` times the stream's size."""
        noise = torch.randn(self.z.vectors.shape, generator=generator, dtype=torch.float32, device="cpu")
        with torch.no_grad():
            self.z.vectors.copy_(noise * scale * self.size)

    def descend(self, steps: int, lr: float, bar: Any) -> None:
        """Run Adam on the sentences that are not solved."""
        optimizer = torch.optim.Adam([self.z.vectors], lr=lr * self.size, betas=(0.9, 0.99))
        left = [row for row, solved in enumerate(self.solved) if not solved]
        for step in range(steps + 1):
            if not left:
                return
            losses, right = self._losses(torch.tensor(left, device=self.ids.device))
            values = losses.detach().tolist()
            for row, loss, is_right in zip(left, values, right.tolist(), strict=True):
                if is_right or loss < self.losses[row]:
                    self.best[row], self.losses[row] = self.z.vectors.detach()[row], loss
                self.solved[row] = is_right
            bar.update(sum(self.solved[row] for row in left))
            bar.set_postfix_str(f"step {step}, {len(left)} left, loss {sum(values) / len(values):.2f}", refresh=False)
            if step == steps:
                return
            optimizer.zero_grad()
            losses.sum().backward()
            optimizer.step()
            left = [row for row in left if not self.solved[row]]
            for row in left:
                self.taken[row] += 1

    def _arguments(self, ids: Tensor) -> dict[str, Any]:
        model: Any = self.found.model
        arguments = forward_arguments(model, Batch(ids, torch.ones_like(ids), padded=False))
        return {key: value for key, value in arguments.items() if key != "logits_to_keep"}

    def _losses(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The mean −log p of each row's tokens [R], and whether all of them are the first choice with a lead [R]."""
        wanted = self.wanted[rows]
        real = wanted >= 0
        model: Any = self.found.model
        with patch(model, self.z, group=rows):
            arguments = self._arguments(self.ids[rows])
            if self.head is None:  # the head is not a plain product, so all layers run
                logits: Tensor = self.section.call(**arguments).logits[real]
            else:
                states = self.section.run(
                    arguments, first=self.first, hidden=self.hidden[rows.to(self.hidden.device)], every_token=True
                )[0]
                logits = self.head.logits(states[real.to(states.device)])  # [tokens, V]
        tokens = wanted[real].to(logits.device)
        loss = torch.nn.functional.cross_entropy(logits.float(), tokens, reduction="none")
        best = logits.detach().topk(2, -1)
        good = (best.indices[:, 0] == tokens) & (best.values[:, 0] - best.values[:, 1] > _LEAD)
        row_of = real.nonzero()[:, 0].to(loss.device)
        count = real.sum(1).to(loss.device)
        total = loss.new_zeros(len(rows)).index_add(0, row_of, loss)
        n_good = torch.zeros_like(count).index_add(0, row_of, good.to(count.dtype))
        return total / count, n_good == count
