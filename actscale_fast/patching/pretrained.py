"""A model with an intervention on it, as one module with the methods that users of Hugging Face's libraries know."""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor, nn

from .._suggestions import did_you_mean
from ..interventions import ActivScalar, DynScalar, Intervention, SteerVec, load_intervention
from . import pretrained_files as files
from .merge import merge
from .patch import AnyPatch, patch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PREFIX = "intervention."
#: For each model in use: how many ActScaleModels hold it, and which parameters were trainable before the first one.
_frozen: weakref.WeakKeyDictionary[nn.Module, tuple[int, list[str]]] = weakref.WeakKeyDictionary()
_KINDS: dict[str, type[Intervention]] = {kind.__name__: kind for kind in (ActivScalar, SteerVec, DynScalar)}


@dataclass
class ActScaleConfig:
    """What `get_actscale_model` creates; the fields are the arguments of `ActivScalar.for_model` and `patch`.

    Args:
        kind: "ActivScalar", "SteerVec" or "DynScalar".
        site, layers, positions, generated, projection, layers_path, mlp: as `for_model` takes them.
        strength: β.
    """

    kind: str = "ActivScalar"
    site: str = "head"
    layers: Iterable[int] | None = None
    positions: Iterable[int] | None = None
    generated: bool = False
    strength: float = 1.0
    projection: str | None = None
    layers_path: str | None = None
    mlp: str | None = None

    def made_for(self, model: nn.Module) -> Intervention:
        """A new intervention for this model; it does nothing yet."""
        if self.kind not in _KINDS:
            names = ", ".join(map(repr, _KINDS))
            raise ValueError(f"kind: got {self.kind!r}, expected one of {names}{did_you_mean(self.kind, _KINDS)}")
        paths = {"projection": self.projection, "layers_path": self.layers_path, "mlp": self.mlp}
        return _KINDS[self.kind].for_model(model, self.site, self.layers, self.positions, self.generated, **paths)  # type: ignore[arg-type]


def get_actscale_model(model: PreTrainedModel, config: ActScaleConfig | Intervention | None = None) -> ActScaleModel:
    """Put an intervention on a model and freeze the model, so that only the intervention is trained.

    Args:
        model: a Hugging Face causal language model. It stays the same object, steered until `unload()`.
        config: what to create (None: one scalar per attention head), or the intervention itself.

    Returns:
        The model and the intervention as one module, which replaces the model in a loop, a `Trainer` or `generate()`.
        For the proximal step of the ℓ1 norm in a `Trainer`, use `ProximalCallback` (integrations.trainer).

    Raises:
        TypeError, ValueError: a bad config, or an intervention for another model.

    Example:
        >>> model = get_actscale_model(model, ActScaleConfig(layers=range(4, 20)))
        >>> model.print_trainable_parameters()
        >>> Trainer(model=model, ...).train()
        >>> model.save_pretrained("scalars")
    """
    if config is None:
        config = ActScaleConfig()
    if isinstance(config, ActScaleConfig):
        return ActScaleModel(model, config.made_for(model), config.strength)
    if not isinstance(config, Intervention):
        raise TypeError(f"config: got {type(config).__name__}, expected an ActScaleConfig or an Intervention")
    return ActScaleModel(model, config)


class ActScaleModel(nn.Module):
    """A frozen model with an intervention applied to it; see `get_actscale_model`.

    Attributes that it does not have are taken from the model. Its `state_dict` holds the intervention alone, so a
    `Trainer` checkpoint takes kilobytes and can be resumed like any other. Copies are steered too.
    """

    _hf_peft_config_loaded = True  # tells `Trainer` that a quantised model has trainable parts

    def __init__(self, model: PreTrainedModel, intervention: Intervention, strength: float = 1.0) -> None:
        super().__init__()
        self._patch: AnyPatch | None = patch(model, intervention, strength)
        self.model, self.intervention = model, intervention
        self.training = model.training  # the parts keep their own flags
        self._freeze([name for name, parameter in model.named_parameters() if parameter.requires_grad])
        self.register_load_state_dict_post_hook(_without_the_models_keys)

    def _freeze(self, learned: list[str]) -> None:
        count, first = _frozen.get(self.model, (0, learned))
        _frozen[self.model] = (count + 1, first)
        self.model.requires_grad_(False)

    @property
    def _applied(self) -> AnyPatch:
        if self._patch is None:
            raise RuntimeError("model: the intervention was taken off by unload()")
        return self._patch

    @property
    def strength(self) -> float | Tensor:
        """β: a float, or one value per row of the batch [B]. Setting it takes effect with the next forward pass."""
        return self._applied.strength

    @strength.setter
    def strength(self, value: float | Tensor) -> None:
        self._applied.strength = value

    def forward(  # Trainer reads from these names which columns of a dataset the model takes
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The model's own forward pass, under the intervention."""
        given = {
            "input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids,
            "inputs_embeds": inputs_embeds, "labels": labels,
        }  # fmt: skip
        return self.model(**{name: value for name, value in given.items() if value is not None}, **kwargs)

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether the model's loss takes `num_items_in_batch`; for `Trainer`."""
        own = getattr(self.model, "accepts_loss_kwargs", None)
        parameters = inspect.signature(self.model.forward).parameters.values()
        return bool(any(p.kind is p.VAR_KEYWORD for p in parameters) if own is None else own)

    @property
    def n_trainable(self) -> tuple[int, int]:
        """(trained numbers, all numbers), those of the model included."""
        parameters = list(self.parameters())
        return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)

    def print_trainable_parameters(self) -> None:
        """Print how many numbers are trained, and how many there are."""
        trained, total = self.n_trainable
        print(f"trainable params: {trained:,} || all params: {total:,} || trainable%: {100 * trained / total:.4g}")

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The frozen model, bit for bit, until the block ends."""
        applied = self._applied
        before, applied.paused = applied.paused, True
        try:
            yield
        finally:
            applied.paused = before

    def get_base_model(self) -> PreTrainedModel:
        """The model, still steered; `unload()` returns it unsteered."""
        return self.model

    def unload(self) -> PreTrainedModel:
        """Take the intervention off and return the model as it was, trainable where it had been.

        Where several ActScaleModels share the model, it becomes trainable again with the last `unload()`.
        """
        if self._patch is not None:
            self._patch.remove()
            self._patch = None
            count, learned = _frozen.pop(self.model)
            if count > 1:
                _frozen[self.model] = (count - 1, learned)
            for name in learned if count == 1 else ():
                self.model.get_parameter(name).requires_grad_(True)
        return self.model

    def merge_and_unload(self) -> PreTrainedModel:
        """The model with the intervention in its weights (`af.merge`, which says what cannot be merged).

        `save_pretrained` of the result writes a plain checkpoint, which any server can run. `af.unmerge` undoes it.
        """
        merge(self.model, self.intervention, self.strength)
        return self.unload()

    def save_pretrained(self, folder: str | Path, **_: Any) -> None:
        """Write the intervention, as `Intervention.save_pretrained` does, and `actscale_config.json`; not the model.

        Keyword arguments of other libraries' `save_pretrained` are ignored.
        """
        if isinstance(self.strength, Tensor):
            raise ValueError("strength: got one value per row, which belong to a batch; set one number before saving")
        base = getattr(getattr(self.model, "config", None), "_name_or_path", "") or None
        files.save(self.intervention, Path(folder), self.strength, base)

    @classmethod
    def from_pretrained(
        cls, model: PreTrainedModel, folder: str | Path, *, is_trainable: bool = False, revision: str | None = None
    ) -> Self:
        """Put a saved intervention on a model.

        Args:
            model: the model that it was made for.
            folder: what `save_pretrained` of this class or of an intervention wrote, or the id of a repository on the
                Hugging Face hub, which is downloaded. `Trainer` checkpoints are resumed by the `Trainer` only.
            is_trainable: False: the parameters of the intervention are frozen too.
            revision: the revision of the repository.

        Raises:
            FileNotFoundError, ValueError: as `af.load_intervention`; also an intervention for another model.
        """
        path = files.local_folder(folder, revision)
        intervention = load_intervention(path)
        strength = files.read_strength(path)
        return cls(model, intervention.requires_grad_(is_trainable), strength)

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | None = None, **kwargs: Any) -> str:
        """Upload what `save_pretrained` writes, with a model card, to a repository; create it where necessary.

        Args:
            repo_id: "name" or "user/name".
            private, token: as in `huggingface_hub.HfApi.create_repo`.
            kwargs: arguments of `HfApi.upload_folder`: commit_message, revision, create_pr, …

        Returns:
            The address of the commit.
        """
        from huggingface_hub import HfApi
        from huggingface_hub.utils import SoftTemporaryDirectory

        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with SoftTemporaryDirectory() as temporary:
            self.save_pretrained(temporary)
            return files.upload(Path(temporary), self.intervention, repo_id, api, **kwargs)

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """The tensors of the intervention alone."""
        return self.intervention.state_dict(destination=destination, prefix=prefix + _PREFIX, keep_vars=keep_vars)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        kept = [parameter.detach().clone() for parameter in self.intervention.parameters()]
        super()._apply(fn, recurse)
        for parameter, value in zip(self.intervention.parameters(), kept, strict=True):
            if parameter.dtype != value.dtype:  # model.half() converts the model; scalars stay fp32
                parameter.data = value.to(parameter.device)
                if parameter.grad is not None:
                    parameter.grad = parameter.grad.to(value.dtype)
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("model", "intervention"):  # not set by __init__ yet
                raise
            return getattr(self.model, name)

    def __copy__(self) -> Self:
        raise TypeError("copy: a shallow copy would steer the shared model twice; use copy.deepcopy")

    def __reduce__(self) -> tuple[Any, ...]:
        applied = self._patch
        state = None if applied is None else (applied.strength, applied.paused, _frozen[self.model][1])
        return _rebuilt, (self.model, self.intervention, self.training, state)


def _rebuilt(
    model: PreTrainedModel,
    intervention: Intervention,
    training: bool,
    state: tuple[float | Tensor, bool, list[str]] | None,
) -> ActScaleModel:
    """A copy made from copies of the parts; `state`: strength, paused, trainable parameters; None after unload()."""
    copied = ActScaleModel(model, intervention)
    copied.training = training
    if state is None:
        copied.unload()
        return copied
    copied.strength, copied._applied.paused, learned = state
    _frozen[model] = (1, learned)
    return copied


def _without_the_models_keys(module: ActScaleModel, incompatible: Any) -> None:
    """Do not report the model's own tensors as missing: a state_dict never has them, whatever its prefix."""
    own = {f"model.{name}" for name in module.model.state_dict()}
    starts = (range(len(key)) for key in incompatible.missing_keys)
    incompatible.missing_keys[:] = [
        key
        for key, places in zip(incompatible.missing_keys, starts, strict=True)
        if not any(key[at:] in own for at in places if at == 0 or key[at - 1] == ".")
    ]
