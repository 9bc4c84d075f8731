"""Interchange interventions in a learned subspace: Boundless DAS (arXiv 2305.08809).

    out = Rᵀ((1 − m)⊙R·h + m⊙R·s)                    h: the base's activation, s: the source's
    m_i = sigmoid(i/T)·sigmoid((b·D − i)/T)          i = 0 … D − 1, boundary b in [1e-3, 1], temperature T
    y   = h + β·(out − h)

R is orthogonal, so out − h = Rᵀ(m⊙R(s − h)): two products instead of three, and exactly 0 where s = h or m = 0.
The mask is the paper's: as T falls to 0, m_i approaches 1 for 0 < i < b·D and 0 beyond; m_0 stays ½.

A product with R costs 2·D² operations for each steered token; other tokens are copied.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..architectures.location import Location
from ..interventions.placement import Placement
from ..interventions.takes_source import TakesSource, check_source_positions
from .rotation import Rotation
from .sources import activations_at

LEAST_BOUNDARY = 1e-3  # the paper's code clamps b to [1e-3, 1]
TEMPERATURE = 50.0  # where annealing begins


class BoundlessDAS(TakesSource):
    """Swaps a subspace of an activation for that of another prompt, the source: Rᵀ((1−m)⊙R·h_base + m⊙R·h_source).

    Each layer, position and head (or whole site) has a rotation R and a boundary b (arXiv 2305.08809). β = 1 is the
    interchange, β = 0 the identity. Every pass needs the source's activations, which `interchange` sets. Only tokens of
    the prompt are edited; tokens generated after it see the interchange through the KV cache.

    `boundary` is fp32 [L, P, H] and starts at 0.5. `rotation` is fp32 [L, P, H, D, D]; its row i is axis i.
    `temperature` is a buffer and is saved; 0 makes a hard mask, m_i = 1 where i < b·D.

    Args:
        location: with a list of positions and without generated tokens.
        n_groups: None; interchanges cannot be stacked.

    Raises:
        ValueError: positions=None, generated tokens, or a stack.
    """

    homogeneous: ClassVar[bool] = False
    called: ClassVar[str] = "das"
    boundary: nn.Parameter
    temperature: Tensor

    def __init__(self, location: Location, *, n_groups: int | None = None, device: torch.device | None = None) -> None:
        check_source_positions(location.positions, location.generated)
        if n_groups is not None:
            raise ValueError("n_groups: a BoundlessDAS is not stacked; give each row a source of its own")
        super().__init__(location, device=device)
        device = self.boundary.device
        with torch.no_grad():
            self.boundary.fill_(0.5)
        self.register_buffer("temperature", torch.tensor(TEMPERATURE, dtype=torch.float32, device=device))
        n_matrices = location.n_slots * location.n_heads
        self.rotations = nn.ModuleList(Rotation(n_matrices, location.width, device) for _ in location.layers)
        self._shared: list[Tensor] | None = None

    @classmethod
    def for_model(
        cls,
        model: nn.Module,
        site: str = "residual",
        layers: Iterable[int] | None = None,
        positions: Iterable[int] | None = None,
        generated: bool = False,
        *,
        seed: int = 0,
        projection: str | None = None,
        layers_path: str | None = None,
        mlp: str | None = None,
    ) -> Self:
        """An interchange with random rotations, on the model's device; see `Intervention.for_model`.

        Args:
            model, site, layers, projection, layers_path, mlp: as in `Intervention.for_model`.
            positions: a list of tokens of the prompt; base and source each count in their own tokens.
            generated: must stay False.
            seed: seed of the random rotations.

        Raises:
            TypeError, ValueError: as in `Intervention.for_model`, and positions=None or generated=True.

        Example:
            >>> das = BoundlessDAS.for_model(model, layers=[15], positions=[-1])
            >>> with das.interchange(source_activations(model, tokenizer, das, sources)), patch(model, das):
            ...     model.generate(**bases)
        """
        check_source_positions(positions, generated)
        das = super().for_model(
            model, site, layers, positions, generated, projection=projection, layers_path=layers_path, mlp=mlp
        )
        generator = torch.Generator().manual_seed(seed)
        for rotation in das._rotations():
            drawn, triangle = torch.linalg.qr(
                torch.randn(rotation.shape, generator=generator, dtype=torch.float32, device="cpu")
            )
            rotation.set(drawn * triangle.diagonal(dim1=-2, dim2=-1).sign()[:, None])  # uniform over rotations
        return das

    @classmethod
    def parameter_tails(cls, location: Location) -> dict[str, tuple[int, ...]]:
        return {"boundary": (location.n_heads,)}

    @property
    def rotation(self) -> Tensor:
        """R of every layer, position and head, [L, P, H, D, D], without gradient; z = R·h."""
        return torch.stack([self._by_slot(rotation.values()) for rotation in self._rotations()])

    def mask(self, layer: int) -> Tensor:
        """m [P, H, D] of one layer (its index among the chosen ones) at the present temperature."""
        axis = torch.arange(self.location.width, device=self.device, dtype=self.boundary.dtype)
        end = self.location.width * self.boundary[layer].clamp(LEAST_BOUNDARY, 1.0)[..., None]
        divisor = torch.where(self.temperature > 0, self.temperature, 1.0)
        soft = torch.sigmoid(axis / divisor) * torch.sigmoid((end - axis) / divisor)
        return torch.where(self.temperature > 0, soft, (axis < end).to(soft.dtype))

    def source_activations(
        self, model: Any, tokenizer: Any, texts: Sequence[Any], *, batch_size: int = 32, progress: bool = False
    ) -> Tensor:
        was_paused, self.paused = self.paused, True
        try:
            return activations_at(model, tokenizer, self.location, texts, batch_size=batch_size, progress=progress)
        finally:
            self.paused = was_paused

    @contextlib.contextmanager
    def shared_rotation(self) -> Iterator[None]:
        """Compute each rotation once for all passes in the `with` block, and its gradient once at the block's end.

        Use it for a training step of several passes and call backward() on each inside the block. Without it, every
        pass with gradients recomputes its rotations.
        """
        made = [rotation.weight for rotation in self._rotations()]
        self._shared = leaves = [weight.detach().requires_grad_(weight.requires_grad) for weight in made]
        try:
            yield
        finally:
            self._shared = None
        reached = [(weight, leaf.grad) for weight, leaf in zip(made, leaves, strict=True) if leaf.grad is not None]
        if reached:
            torch.autograd.backward([weight for weight, _ in reached], [gradient for _, gradient in reached])

    def edit(self, x: Tensor, layer: int, strength: float | Tensor, placement: Placement) -> Tensor:
        if self.paused:
            return x
        source = self.source_of(layer, x)  # [B, P, H, D]
        assert placement.index is not None  # it has a list of positions, and no slot for generated tokens
        n_rows, n_tokens = x.shape[:2]
        wide = torch.promote_types(x.dtype, torch.float32)
        columns = _columns(placement.index, self.location.n_slots, n_tokens).expand(n_rows, -1)  # [B, P]
        index = columns[:, :, None, None].expand_as(source)
        base = x.gather(1, index.clamp(max=n_tokens - 1)).to(wide)
        with torch.autocast(x.device.type, enabled=False):
            rotation = self._rotation(layer).to(x.device, wide)
            mask = self.mask(layer).to(x.device, wide)
            turned = torch.einsum("phij,bphj->bphi", rotation, source - base) * mask
            change = torch.einsum("phij,bphi->bphj", rotation, turned)
        beta = strength.to(wide).view(-1, 1, 1, 1) if isinstance(strength, Tensor) else strength
        # Slots without a token write into a column behind the last one. Contiguous: GPT-2 takes views of its input.
        return F.pad(x, (0, 0, 0, 0, 0, 1)).scatter_(1, index, (base + beta * change).to(x.dtype))[:, :-1].contiguous()

    @property
    def n_parameters(self) -> int:
        """The free numbers: D(D − 1)/2 for each rotation, and the boundaries."""
        return self.boundary.numel() * (self.location.width * (self.location.width - 1) // 2 + 1)

    @property
    def n_active(self) -> int:
        """All parameters, since no value of a rotation means "no change"."""
        return self.n_parameters

    @property
    def l1(self) -> float:
        """The sum of the boundaries, which a fit keeps small."""
        return float(self.boundary.detach().sum(dtype=torch.float64))

    def saved_tensors(self) -> dict[str, Tensor]:
        return {"rotation": self.rotation, "boundary": self.boundary, "temperature": self.temperature}

    @classmethod
    def saved_shapes(cls, location: Location, n_groups: int | None = None) -> dict[str, tuple[int, ...]]:
        slots = (len(location.layers), location.n_slots, location.n_heads)
        return {"rotation": (*slots, location.width, location.width), "boundary": slots, "temperature": ()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        temperature = float(tensors["temperature"])
        if not 0 <= temperature < float("inf"):
            raise ValueError(f"temperature: got {temperature}, expected a finite number >= 0")
        for rotation, values in zip(self._rotations(), tensors["rotation"], strict=True):
            rotation.set(values.flatten(0, 1))
        with torch.no_grad():
            self.boundary.copy_(tensors["boundary"])
            self.temperature.fill_(temperature)

    def _rotation(self, layer: int) -> Tensor:
        """R of one layer [P, H, D, D], with gradient where one is wanted."""
        if self._shared is not None:
            return self._by_slot(self._shared[layer])
        rotation = self._rotations()[layer]
        learned = torch.is_grad_enabled() and rotation.free.requires_grad
        return self._by_slot(rotation.weight if learned or torch.compiler.is_compiling() else rotation.values())

    def _rotations(self) -> list[Rotation]:
        return list(self.rotations)  # type: ignore[arg-type]

    def _by_slot(self, weight: Tensor) -> Tensor:
        """[P·H, D, D] as [P, H, D, D]."""
        return weight.unflatten(0, (-1, self.location.n_heads))


def _columns(index: Tensor, n_slots: int, n_tokens: int) -> Tensor:
    """The column of each slot's token, int64 [R, P], from the slot of each token [R, T]; T where it has none."""
    hit = index[:, None] == torch.arange(n_slots, device=index.device)[:, None]  # [R, P, T]
    return torch.where(hit.any(-1), hit.to(torch.uint8).argmax(-1), n_tokens)
