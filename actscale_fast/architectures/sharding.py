"""How a model's weights are stored: whole, sharded over processes, on the meta device, or packed by a quantiser.

Everything in the package that depends on this asks here. Two engines shard the weights of a model:

- Tensor parallelism (transformers' `tp_plan`): every process runs a part of each layer on the same rows. Each holds
  some of the attention heads; all other sites are whole in every process.
- FSDP2 (`torch.distributed.fsdp.fully_shard`): every process runs whole layers, whose weights are gathered before they
  run, on rows of its own.

With either, the processes that hold a model must run the same forward and backward passes in the same order, or they
wait for each other for ever (`ModelProcesses`). Other engines are refused by name (`refuse_wrapper`, `refuse_parts`).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")

_INSTEAD = 'shard it with FSDP2 (`torch.distributed.fsdp.fully_shard`) or tensor parallelism (`tp_plan="auto"`)'
#: Wrappers around a model, by their class's name, and what to use instead.
_REFUSED_WRAPPERS = {
    "DataParallel": "one process per device (torchrun), each with the model",
    "DistributedDataParallel": "the model inside it (`.module`): `fit` and `sweep` share their work by themselves",
    "FullyShardedDataParallel": f"FSDP2 in place of FSDP1: {_INSTEAD}",
    "DeepSpeedEngine": f"the model inside it (`.module`) without ZeRO-3, or {_INSTEAD}",
    "PipelineParallel": _INSTEAD,
}


@dataclass(frozen=True)
class ModelProcesses:
    """The processes that hold one model together and must run the same passes in the same order.

    Every method is a collective operation, which all of them must call; with a single process it does nothing.
    """

    ranks: tuple[int, ...] = (0,)  # in the default process group
    rank: int = 0  # the number of this process among them
    group: Any = None  # torch.distributed's process group; None: the default one
    #: How many places for rows there are (those of FSDP2), and which of them this process has. Processes with the same
    #: place must run the same rows (tensor parallelism).
    n_places: int = 1
    place: int = 0
    peers: tuple[Any, ...] = ()  # the groups over which a sum is that of all places

    @property
    def size(self) -> int:
        return len(self.ranks)

    @property
    def same_rows(self) -> bool:
        """Whether all of them must run the same rows."""
        return self.n_places == 1

    @property
    def leads(self) -> bool:
        """Whether this process decides where numbers might differ in rounding, and writes what belongs to the model."""
        return self.rank == 0

    def all_gather(self, value: T) -> list[T]:
        """The objects of all processes, ordered by rank."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(found, value, group=self.group)
        return found

    def leaders(self, value: T) -> T:
        """The first process's object, in all of them."""
        if self.size == 1:
            return value
        found: list[Any] = [value]
        torch.distributed.broadcast_object_list(found, src=self.ranks[0], group=self.group)
        return found[0]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in one of them."""
        return any(self.all_gather(bool(flag)))

    def from_leader(self, call: Callable[[], T]) -> T:
        """What the call returns in the first process, which alone makes it; an error there is raised in all."""
        if self.size == 1:
            return call()
        value: Any = None
        error: Exception | None = None
        if self.leads:
            try:
                value = call()
            except Exception as found:
                error = found
        value, error = self.leaders((value, error))
        if error is not None:
            raise error
        return value

    def broadcast_(self, tensors: list[Tensor]) -> None:
        """Replace tensors by those of the first process, so that all go on with the same bits."""
        if self.size == 1:
            return
        for tensor in tensors:
            torch.distributed.broadcast(tensor, self.ranks[0], group=self.group)


ALONE = ModelProcesses()


def model_processes(model: nn.Module) -> ModelProcesses:
    """The processes that hold this model together; `ALONE` where its weights are whole in this process.

    Raises:
        ValueError: the model is held by a part of the processes over a mesh of several dimensions, or by tensor
            parallelism whose weights do not say so.
    """
    if not _initialized():
        return ALONE
    fsdp, tensor_parallel = fsdp_mesh(model), tensor_parallel_mesh(model)
    said: Any = getattr(model, "_tp_size", None)
    if tensor_parallel is None and isinstance(said, int) and said > 1:
        raise ValueError(
            f"model: transformers divided it among {said} processes, but no weight is a DTensor, which would say how; "
            "use a version of transformers that is tested"
        )
    meshes = [mesh for mesh in (fsdp, tensor_parallel) if mesh is not None and mesh.size() > 1]
    if not meshes:
        return ALONE
    if len(meshes) == 1 and meshes[0].ndim == 1:
        ranks, group = tuple(meshes[0].mesh.tolist()), meshes[0].get_group()
    else:
        ranks, group = tuple(range(torch.distributed.get_world_size())), None
        if math.prod(mesh.size() for mesh in meshes) != len(ranks):
            raise ValueError(
                f"model: its weights are sharded over meshes of {' and '.join(str(mesh.size()) for mesh in meshes)} of "
                f"the {len(ranks)} processes, which is not supported; use all processes, or a mesh of one dimension"
            )
    rank = ranks.index(torch.distributed.get_rank())
    if fsdp is None or fsdp.size() == 1:
        return ModelProcesses(ranks, rank, group)
    place = fsdp.mesh.flatten().tolist().index(torch.distributed.get_rank())
    peers = tuple(fsdp.get_group(axis) for axis in range(fsdp.ndim))
    return ModelProcesses(ranks, rank, group, fsdp.size(), place, peers)


def is_sharded(model: nn.Module) -> bool:
    """Whether some of a model's weights are sharded over processes, also where FSDP2 holds them whole at the moment."""
    return _initialized() and (fsdp_mesh(model) is not None or any(is_dtensor(p) for p in model.parameters()))


def is_dtensor(value: object) -> bool:
    """Whether a tensor is a part of one that is sharded over processes."""
    return any(kind.__name__ == "DTensor" for kind in type(value).__mro__)


def refuse_dtensor(x: Tensor) -> None:
    """Raise a ValueError for an activation that is sharded over processes, as an edit cannot change a part of it."""
    if type(x) is not Tensor and is_dtensor(x):
        raise ValueError(
            "model: an activation at the site is a DTensor, as torch's `parallelize_module` passes them between "
            'modules; use transformers\' tensor parallelism (`tp_plan="auto"`), or FSDP2'
        )


def fsdp_modules(model: nn.Module) -> Iterator[Any]:
    """The modules of a model that `fully_shard` was called on."""
    kind = _fsdp_class()
    return iter(()) if kind is None else (module for module in model.modules() if isinstance(module, kind))


def own_class(module: nn.Module) -> type[nn.Module]:
    """A module's class, or its original class if `fully_shard` has replaced it."""
    kind = _fsdp_class()
    if kind is None or not isinstance(module, kind):
        return type(module)
    return next(cls for cls in type(module).__mro__ if not issubclass(cls, kind))


def _fsdp_class() -> Any:
    """The class that `fully_shard` puts in front of a module's; None where FSDP2 is not imported and shards nothing."""
    return getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)


def fsdp_mesh(model: nn.Module) -> Any:
    """The processes over which FSDP2 shards a model; None: it does not."""
    for module in fsdp_modules(model):
        group = module._get_fsdp_state()._fsdp_param_group  # None where all parameters belong to modules inside
        if group is not None:
            return group.mesh_info.mesh
    return None


def tensor_parallel_mesh(model: nn.Module) -> Any:
    """The processes over which tensor parallelism shards a model; None: it does not."""
    managed = fsdp_mesh(model) is not None
    for value in model.parameters():
        if is_dtensor(value):
            mesh: Any = value.device_mesh  # type: ignore[attr-defined]
            if not managed:
                return mesh
            if "tp" in (mesh.mesh_dim_names or ()):
                return mesh["tp"]
    return None


def reshard(model: nn.Module) -> None:
    """Give up the whole weights that FSDP2 may hold after a forward pass, so that a model's parameters are shards."""
    for module in fsdp_modules(model):
        module.reshard()


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds, as a plain tensor that shares its memory."""
    found = tensor.detach()
    return found.to_local() if is_dtensor(found) else found  # type: ignore[attr-defined]


def own_part(whole: Tensor, weight: Tensor) -> Tensor:
    """The part of `whole`, which can be broadcast to a weight, for the part of the weight that this process holds."""
    if not is_dtensor(weight):
        return whole
    lengths, offsets = _local_extent(weight)
    found = whole
    for axis in range(1, whole.dim() + 1):  # from the last, as broadcasting does
        if whole.shape[-axis] > 1:
            found = found.narrow(-axis, offsets[-axis], lengths[-axis])
    return found


def sampled(weight: Tensor, index: Tensor) -> Tensor:
    """Elements of a weight by their place in the whole, flattened weight; a collective operation for a sharded one.

    Args:
        weight: plain or sharded.
        index: int64 [K] on the weight's device.
    """
    own = local(weight)
    if not is_dtensor(weight):
        return own[torch.unravel_index(index, own.shape)] if own.dim() else own.reshape(-1)[index]
    if any(type(placement).__name__ == "_StridedShard" for placement in weight.placements):  # type: ignore[attr-defined]
        return sampled(weight.detach().full_tensor(), index)  # type: ignore[attr-defined]
    lengths, offsets = _local_extent(weight)
    places = torch.unravel_index(index, weight.shape)
    inside = torch.ones_like(index, dtype=torch.bool)
    for place, length, offset in zip(places, lengths, offsets, strict=True):
        inside &= (place >= offset) & (place < offset + length)
    values = torch.zeros(len(index), dtype=own.dtype, device=own.device)
    values[inside] = own[tuple(place[inside] - offset for place, offset in zip(places, offsets, strict=True))]
    values_bytes = values.view(-1, 1).view(torch.uint8)
    mesh: Any = weight.device_mesh  # type: ignore[attr-defined]
    for axis, placement in enumerate(weight.placements):  # type: ignore[attr-defined]
        if placement.is_shard():  # each element is in one process, and 0 in the others
            torch.distributed.all_reduce(values_bytes, group=mesh.get_group(axis))
    return values


def storages(tensor: Tensor) -> list[tuple[int, int]]:
    """(identity, bytes) of the memory behind a tensor, or behind the parts of a quantised or sharded one.

    The identity is not the address: FSDP2 frees weights and keeps their storages, whose address then serves others.
    """
    if is_dtensor(tensor):
        return storages(local(tensor))
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        parts = [getattr(tensor, name) for name in names]
        return [one for part in parts if isinstance(part, Tensor) for one in storages(part)]
    if tensor.is_meta:
        return []
    storage = tensor.untyped_storage()
    return [(storage._cdata, storage.nbytes())]


def stored_as(tensor: object) -> Literal["plain", "sharded", "meta", "partitioned", "packed"]:
    """How a weight is stored.

    Returns:
        "plain": floating-point values in memory; "sharded": a part of such values, with other parts in other processes;
        "meta": a placeholder, perhaps for an offloaded weight; "partitioned": a placeholder of DeepSpeed's ZeRO-3;
        "packed": by a quantiser, as integers or in a tensor class of its own.
    """
    if hasattr(tensor, "ds_id") and isinstance(tensor, Tensor) and not tensor.numel():
        return "partitioned"
    if is_dtensor(tensor):
        return "sharded"
    if isinstance(tensor, Tensor) and tensor.is_meta:
        return "meta"
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.is_floating_point()  # type: ignore[attr-defined]
    return "plain" if plain else "packed"


def refuse_wrapper(model: nn.Module) -> None:
    """Raise a ValueError that names the engine, and what to use instead, for a wrapper around a Hugging Face model."""
    for kind in type(model).__mro__:
        instead = _REFUSED_WRAPPERS.get(kind.__name__)
        if instead is not None and kind.__module__.partition(".")[0] in ("torch", "deepspeed", "accelerate"):
            raise ValueError(f"model: {kind.__name__} is not supported; use {instead}")


def refuse_parts(model: nn.Module, parts: Iterable[nn.Module]) -> None:
    """Raise a ValueError, as `refuse_wrapper` does, for FSDP1, pipeline stages and DeepSpeed's ZeRO-3.

    Args:
        model: the Hugging Face model.
        parts: the modules that such engines replace: its decoder and layers.
    """
    kinds = {type(part).__name__ for part in (model, *parts)}
    if "FullyShardedDataParallel" in kinds:
        raise ValueError(f"model: FSDP1 (FullyShardedDataParallel) is not supported; {_INSTEAD}")
    if "PipelineIdentityLayer" in kinds:
        raise ValueError(f"model: pipeline stages, which hold some of the layers, are not supported; {_INSTEAD}")
    if hasattr(next(model.parameters(), None), "ds_id"):  # DeepSpeed marks all parameters, and keeps small ones whole
        name = next((name for name, value in model.named_parameters() if stored_as(value) == "partitioned"), None)
        if name is not None:
            raise ValueError(f"model: {name} is partitioned by DeepSpeed's ZeRO-3, which is not supported; {_INSTEAD}")


def _initialized() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _local_extent(weight: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(lengths, offsets) of the part of a sharded weight that this process holds.

    Raises:
        ValueError: the part is not a block of the weight.
    """
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    for placement in weight.placements:
        if not (placement.is_replicate() or type(placement).__name__ == "Shard"):
            raise ValueError(
                f"model: a weight of shape {tuple(weight.shape)} is sharded as {placement}, which is not supported here"
            )
    lengths, offsets = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
    return tuple(lengths), tuple(offsets)
