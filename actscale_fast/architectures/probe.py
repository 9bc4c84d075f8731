"""The short forward passes that show what a model's sites are: rows that begin alike, changed apart on their way.

Factors are powers of two, exact in every dtype; each row has one digit of the head's number in base 8.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..modules import hooks as surgery
from ..modules.hooks import suspended
from ..modules.without_side_effects import without_side_effects
from .arguments import cache_argument
from .attention_outputs import heads_changed, values_changed

if TYPE_CHECKING:
    from .layout import ModelLayout

_FACTORS = (2.0, 0.5, 4.0, 0.25, 8.0, 0.125, 16.0, 0.0625)
_N_TOKENS = 4
#: What rows may differ by beside the factors, relative to their norm: rounding of another order of sums.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.02}
#: A site cannot act where doubling its output changes the stream by less than this share of what negating changes.
_IDLE = 0.02


@dataclass(frozen=True)
class Verdict:
    """What the check of one site showed, by layer."""

    reasons: Mapping[int, str]  # why the site of a layer is refused
    idle: frozenset[int]  # layers where a factor on the site's output changes nothing
    absent: frozenset[int] = frozenset()  # refused layers, those that do not run at all


class Probe:
    """Short forward passes of a decoder whose rows begin alike."""

    def __init__(self, found: ModelLayout, modules: Mapping[int, nn.Module]) -> None:
        self.found, self.modules = found, modules
        self.calls = dict.fromkeys(range(found.n_layers), 0)  # of the layer
        self.uses = dict.fromkeys(modules, 0)  # of the site's module
        self.reasons: dict[int, str] = {}
        self.absent: set[int] = set()
        self.compared: set[int] = set()  # layers whose heads have arrived at their projection
        self.sure = True  # False: numbers that are 0 or none have shown nothing
        self.n_rows = 1

    def heads(self) -> Verdict:
        """Of the head site."""
        sizes = {layer: self.found.heads[layer] for layer in self.modules}
        most = max((size[0] for size in sizes.values() if size is not None), default=1)
        self.n_rows = 1 + _digits(most)
        scaled: dict[int, Tensor] = {}  # of layers whose heads were scaled: by what, [rows, H]

        def entering(layer: int, size: tuple[int, int]) -> Callable[..., Any]:
            def hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
                self.uses[layer] += 1
                if not args:
                    self.reasons[layer] = "its projection is called without a positional input"
                    return None
                if layer not in scaled:
                    return None
                rows = self._rows(args[0])
                self.compared.add(layer)
                problem = self._compare(rows, scaled[layer])
                if problem:
                    self.reasons.setdefault(layer, problem)
                return (rows[:1].expand_as(rows).reshape(args[0].shape).contiguous(), *args[1:])

            return hook

        changes = {}
        for layer, size in sizes.items():
            assert size is not None
            for module in self._attention(layer):
                changes[module] = self._returned(layer, size, scaled)
        with self._watching(), contextlib.ExitStack() as hooks:
            for layer, module in self.modules.items():
                size = sizes[layer]
                assert size is not None
                hooks.callback(module.register_forward_pre_hook(entering(layer, size)).remove)
            with heads_changed(changes):
                self._run()
            self._once()
            rest = [layer for layer in self.modules if layer not in scaled and layer not in self.reasons]
            if rest:
                self._by_values(rest, sizes, scaled)
        for layer in self.modules:
            if layer not in self.compared:
                self.reasons.setdefault(
                    layer,
                    "neither transformers' attention functions nor the KV cache exposes its heads, so their layout "
                    "before the projection cannot be verified",
                )
        return Verdict(self.reasons, frozenset(), frozenset(self.absent))

    def whole(self, site: str) -> Verdict:
        """Of a whole site: attn_out, mlp_out or residual."""
        self.n_rows = 3  # as it is, doubled, negated
        factors, width = torch.tensor([1.0, 2.0, -1.0], dtype=torch.float32, device="cpu"), self.found.hidden_size
        idle: set[int] = set()
        last = self.found.n_layers - 1

        def changed(x: Tensor) -> Tensor:
            rows = self._rows(x)
            return (rows[:1] * factors.to(rows).view(-1, *[1] * (rows.dim() - 1))).reshape(x.shape)

        def leaving(layer: int) -> Callable[..., Any]:
            def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
                self.uses[layer] += 1
                x = surgery.first_of(output)
                problem = _no_stream(x, self.n_rows * _N_TOKENS, width)
                if problem:
                    self.reasons.setdefault(layer, f"{type(module).__name__} returns {problem}")
                    return None
                if site == "residual" and layer and _is_idle(self._rows(x)):
                    idle.add(layer - 1)  # what the layer below returned, doubled, made no difference to this one
                return surgery.with_first(output, changed(x))

            return hook

        def left(layer: int) -> Callable[..., Any]:
            def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
                x = surgery.first_of(output)
                axis = None if not isinstance(x, Tensor) or layer in self.reasons else self._row_axis(x)
                if axis is None:
                    return None
                rows = x.movedim(axis, 0) if x.shape[axis] == self.n_rows else self._rows(x)
                if _is_idle(rows):
                    idle.add(layer)
                alike = rows[:1].expand_as(rows)
                alike = alike.movedim(0, axis) if x.shape[axis] == self.n_rows else alike.reshape(x.shape)
                return surgery.with_first(output, alike.contiguous())

            return hook

        with self._watching(), contextlib.ExitStack() as hooks:
            for layer, module in self.modules.items():
                hooks.callback(module.register_forward_hook(leaving(layer)).remove)
                if site != "residual":
                    hooks.callback(self.found.layers[layer].register_forward_hook(left(layer)).remove)
            output = self._run()
        self._once()
        if site == "residual" and last not in self.reasons:
            final = output[0] if isinstance(output, tuple) else output.last_hidden_state
            if _is_idle(self._rows(final)):
                idle.add(last)
        return Verdict(self.reasons, frozenset(idle), frozenset(self.absent))

    def _by_values(
        self, layers: list[int], sizes: Mapping[int, tuple[int, int] | None], scaled: dict[int, Tensor]
    ) -> None:
        """Show the heads of attention that is computed without transformers' functions by its values in the cache."""
        name = cache_argument(self.found.decoder)
        if name is None:
            return

        def change(layer: int, values: Tensor) -> Tensor:
            size = sizes.get(layer)
            if layer not in layers or size is None or values.dim() != 4 or size[0] % values.shape[1]:
                return values
            factors = self._factors(values.shape[1], values)
            scaled[layer] = factors.repeat_interleave(size[0] // values.shape[1], 1)  # query heads share them
            return values * factors[:, :, None, None]

        shown = dict(scaled)
        scaled.clear()  # in this pass no other layer is scaled
        try:
            self._run(**{name: values_changed(change, self.found.decoder), "use_cache": True})
        except torch.OutOfMemoryError:
            raise
        except Exception:  # a cache that this family does not understand shows nothing
            pass
        scaled.update(shown)

    def _returned(self, layer: int, size: tuple[int, int], scaled: dict[int, Tensor]) -> Callable[[Tensor], Tensor]:
        def change(heads: Tensor) -> Tensor:
            if heads.dim() != 4 or heads.shape[0] != self.n_rows or heads.shape[2:] != size:
                self.reasons.setdefault(
                    layer,
                    f"attention returns heads of shape {tuple(heads.shape[2:])}, but the projection's input was taken "
                    f"for {size[0]} heads of width {size[1]}",
                )
                return heads
            scaled[layer] = self._factors(size[0], heads)
            return heads * scaled[layer][:, None, :, None]

        return change

    def _factors(self, n_heads: int, like: Tensor) -> Tensor:
        """[rows, H]; the first row is 1."""
        digits = [[1.0] * n_heads]
        for digit in range(self.n_rows - 1):
            digits.append([_FACTORS[head // 8**digit % 8] for head in range(n_heads)])
        return torch.tensor(digits, dtype=like.dtype, device=like.device)

    def _compare(self, rows: Tensor, factors: Tensor) -> str | None:
        """What is wrong with the projection's input [rows, ..., H·D] under factors [rows, H], or None."""
        n_heads = factors.shape[1]
        heads = rows.detach().reshape(self.n_rows, -1, n_heads, rows.shape[-1] // n_heads).double()
        expected = heads[:1] * factors.to(heads)[:, None, :, None]
        off = (heads - expected).norm(dim=(1, 3))  # [rows, H]
        size = expected.norm(dim=(1, 3))
        if not bool((size.isfinite() & (size > 0)).all()):  # nothing, or no number, shows nothing
            self.sure = False
            return None
        bad = ~(off <= _TOLERANCE.get(rows.dtype, 0.05) * size).all(0)
        if not bool(bad.any()):
            return None
        return (
            f"something between its heads and the projection mixes or normalises them: a factor on head "
            f"{int(bad.int().argmax())} does not arrive as that factor at its place of the projection's input "
            f"({int(bad.sum())} of {n_heads} heads)"
        )

    def _row_axis(self, x: Tensor) -> int | None:
        """The axis of the rows in what a layer returns, some of which keep several streams; None: not known."""
        if x.dim() == 2 and x.shape[0] == self.n_rows * _N_TOKENS:
            return 0
        return next((axis for axis, size in enumerate(x.shape[:-1]) if size == self.n_rows), None)

    def _rows(self, x: Tensor) -> Tensor:
        """x [B, T, ...], or [B·T, ...] of a family that flattens rows and tokens, with the rows apart."""
        return x if x.shape[0] == self.n_rows else x.reshape(self.n_rows, -1, *x.shape[1:])

    def _attention(self, layer: int) -> list[nn.Module]:
        """The modules that attention of a layer is made of."""
        block = self.found.layers[layer]
        top = self.found.projection.partition(".")[0]
        return list(block.get_submodule(top).modules())

    @contextlib.contextmanager
    def _watching(self) -> Iterator[None]:
        """Count the calls of the layers; nothing else in the model tells afterwards that it ran."""
        with without_side_effects(self.found.model), suspended(self.found.decoder), contextlib.ExitStack() as undo:
            for index, layer in enumerate(self.found.layers):

                def count(module: nn.Module, args: tuple[Any, ...], index: int = index) -> None:
                    self.calls[index] += 1

                undo.callback(layer.register_forward_pre_hook(count).remove)
            yield

    def _run(self, **arguments: Any) -> Any:
        from .arguments import accepted_arguments

        decoder = self.found.decoder
        embedding: Any = self.found.model.get_input_embeddings()  # type: ignore[operator]
        weight = getattr(embedding, "weight", None)
        n_known = int(getattr(embedding, "num_embeddings", 0) or self.found.vocabulary)
        ids = torch.tensor([[7, 11, 5, 13][:_N_TOKENS]], dtype=torch.int64, device="cpu") % max(n_known, 1)
        device = weight.device if isinstance(weight, Tensor) and not weight.is_meta else None
        ids = ids.repeat(self.n_rows, 1).to(device or torch.device("cpu"))
        if "use_cache" in accepted_arguments(decoder):  # type: ignore[arg-type]
            arguments.setdefault("use_cache", False)
        return decoder(input_ids=ids, **arguments)

    def _once(self) -> None:
        """Refuse layers, and modules of the site, that do not run exactly once."""
        for layer in self.modules:
            for what, count in (("the layer", self.calls[layer]), ("its module", self.uses[layer])):
                if count != 1 and layer not in self.reasons:
                    times = "does not run" if not count else f"runs {count} times"
                    if not count:
                        self.absent.add(layer)
                    self.reasons[layer] = f"{what} {times} in a forward pass of text, expected once"


def _digits(n_heads: int) -> int:
    count = 1
    while 8**count < n_heads:
        count += 1
    return count


def _no_stream(x: Any, n_tokens: int, width: int) -> str | None:
    """What a site's output is where it is no [B, T, d], or [B·T, d] of a family that flattens rows and tokens."""
    if not isinstance(x, Tensor):
        return f"a {type(x).__name__}"
    if x.dim() not in (2, 3) or x.shape[-1] != width or x.numel() != n_tokens * width:
        return f"a tensor {tuple(x.shape)}, not the stream of {width} numbers per token"
    return None


def _is_idle(rows: Tensor) -> bool:
    """Whether doubling changed nothing where negating did, of rows [as it is, doubled, negated]."""
    doubled, negated = ((rows[index] - rows[0]).double().norm() for index in (1, 2))
    return bool((doubled <= _IDLE * negated) & (negated > 0))  # a branch that is 0 so far may act once it is not
