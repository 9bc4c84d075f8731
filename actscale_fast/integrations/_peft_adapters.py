"""PEFT's (IA)³ adapters and activation scalars: each is converted to the other where both mean the same.

    site head       h·(1 + β·α_h) before the output projection     a feed-forward vector of that projection, [1, H·D],
                                                                   with head h's factor D times
    attn_out,       the projection's output · (1 + β·α)            the output vector of the attention's (the MLP's last)
    mlp_out                                                        projection, [d, 1], with one factor d times
Anything else is refused with the reason. The adapter's factors are those that `af.patch` multiplies by, l = 1 + β·α in
float32, so a written adapter gives the same bits. α = l − 1 is read back exactly for l ≥ 1/2 and for every factor that
was written here, otherwise to 3e-8.

An adapter folder holds `adapter_config.json` and `adapter_model.safetensors`; a pickle in its place is not opened.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import IA3Config
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors, save as save_tensors
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .._files import atomic_path
from .._json import LARGEST, parsed, read_limited, write_json
from ..architectures.families import FAMILIES
from ..architectures.hugging_face import unwrap
from ..architectures.layout import ModelLayout, layout
from ..interventions import ActivScalar, Composite, Intervention
from ..interventions.saving import made_folder
from ..patching.edits import one_strength
from ..patching.merge import site_linear

#: PEFT's prefix and suffix around a module's name.
_BEFORE, _AFTER = "base_model.model.", ".ia3_l"
_SITES = ("head", "attn_out", "mlp_out")


def to_peft_ia3(
    intervention: Intervention, folder: str | Path, *, strength: float = 1.0, model: nn.Module | None = None
) -> None:
    """Write activation scalars as an (IA)³ adapter that any PEFT loads: `PeftModel.from_pretrained(model, folder)`.

    The adapter lists the modules of the chosen layers only, so the other layers cost nothing and are not trained later.

    Args:
        intervention: an ActivScalar with positions=None and not stacked, at the sites head, attn_out or mlp_out; or a
            Composite of such, not with both head and attn_out of one layer.
        folder: output folder; an adapter in it is replaced.
        strength: β, one number; the adapter holds 1 + β·α.
        model: the model that the adapter will be loaded on, or one like it, which gives the module names. None: the
            names of a known model family, at the sites head and attn_out.

    Raises:
        TypeError, ValueError: an intervention that one factor per channel cannot express (with the reason), another
            model, or values that are not finite. Nothing is written in these cases.
    """
    if not isinstance(intervention, Intervention):
        raise TypeError(f"intervention: got {type(intervention).__name__}, expected an ActivScalar")
    beta = one_strength(strength, "one number")
    vectors: dict[str, Tensor] = {}
    inputs_first = False  # Conv1D keeps [in, out]
    for factor, part in intervention.pairs:
        _check_expressible(part)
        part.check_finite()
        for index, (name, transposed) in enumerate(_modules(part, model)):
            vector = _vector(part, index, factor * beta)
            before = vectors.get(name, torch.ones_like(vector))
            if before.shape != vector.shape:
                raise ValueError(
                    f"intervention: it scales both the input (heads) and the output of {name!r}, but an (IA)³ adapter "
                    "holds one vector for each module; write two adapters"
                )
            vectors[name], inputs_first = before * vector, inputs_first or transposed
    for name, vector in vectors.items():
        if not vector.isfinite().all():
            raise ValueError(f"strength: with {beta}, factors of {name!r} are not finite")
    inner: Any = None if model is None else unwrap(model)
    config = IA3Config(
        task_type="CAUSAL_LM" if inner is None or inner.can_generate() else None,  # type: ignore[operator]
        base_model_name_or_path=getattr(inner, "name_or_path", None) or None,
        target_modules=list(vectors),
        feedforward_modules=[name for name, vector in vectors.items() if vector.shape[0] == 1],
        fan_in_fan_out=inputs_first,
        inference_mode=True,
    )
    _write(Path(folder), config, {f"{_BEFORE}{name}{_AFTER}": vector for name, vector in vectors.items()})


def _check_expressible(part: Intervention) -> None:
    """Raise a ValueError for what one factor per channel, the same for every token and row, cannot express."""
    location = part.location
    reason = ""
    if type(part) is not ActivScalar:
        reason = f"{type(part).__name__} is not one factor per channel"
    elif part.n_groups is not None:
        reason = "a stack differs between rows, but an adapter does not; write one of its parts"
    elif location.positions is not None:
        reason = "it has positions, but an adapter acts on every token"
    elif location.site == "residual":
        reason = "no linear layer produces the residual stream by itself"
    if reason:
        raise ValueError(f"intervention: {reason}; use patch")


def _modules(part: Intervention, model: nn.Module | None) -> list[tuple[str, bool]]:
    """(name, whether it is a Conv1D) of the linear layer that stands for the site, in each of the part's layers."""
    location = part.location
    if model is None:
        family = FAMILIES.get(location.model.model_type)
        if family is None or location.paths or location.site == "mlp_out":
            raise ValueError(
                f"model: got None, but the modules of {location.model.model_type!r} at the site {location.site!r} can "
                "only be found in the model"
            )
        path = f"{family.layers}.{{}}.{family.projection}"  # only GPT-2 has Conv1D
        return [(path.format(layer), location.model.model_type == "gpt2") for layer in location.layers]
    found = layout(model, location.paths)
    location.model.require(found.fingerprint)
    names = _names(found)
    modules = []
    for layer in location.layers:
        module = site_linear(found, location.site, layer)
        kind = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if not isinstance(kind, nn.Linear | Conv1D):
            raise ValueError(
                f"model: layer {layer}'s projection is a {type(kind).__name__}, expected nn.Linear or Conv1D"
            )
        modules.append((names[module], isinstance(kind, Conv1D)))
    return modules


def _names(found: ModelLayout) -> dict[nn.Module, str]:
    """The name of each module without an adapter: PEFT's layers wrap the module as `base_layer`."""
    return {module: name.replace(".base_layer", "") for name, module in found.model.named_modules()}


def _vector(part: Any, index: int, strength: float) -> Tensor:
    """PEFT's vector of one layer: [1, in] at the head site, [out, 1] at the others, float32."""
    factors = (1 + strength * part.alpha.detach()[index].reshape(-1).float()).cpu()  # [H] or [1], as the kernels do
    if part.location.site == "head":
        return factors.repeat_interleave(part.location.width)[None].contiguous()
    return factors.expand(part.location.width, 1).contiguous()


def _write(folder: Path, config: IA3Config, tensors: dict[str, Tensor]) -> None:
    """Write both files atomically; in between, the folder holds no adapter rather than a mixture."""
    content = {key: sorted(v) if isinstance(v, set) else v for key, v in config.to_dict().items()}
    payload = save_tensors(tensors, metadata={"format": "pt"})
    (made_folder(folder) / CONFIG_NAME).unlink(missing_ok=True)
    with atomic_path(folder / SAFETENSORS_WEIGHTS_NAME) as temporary:
        temporary.write_bytes(payload)
    write_json(folder / CONFIG_NAME, content)


def from_peft_ia3(folder: str | Path, model: nn.Module) -> ActivScalar | Composite:
    """Read an (IA)³ adapter as activation scalars α = l − 1, if its factors l are equal within each head (or site).

    Args:
        folder: written by PEFT's `save_pretrained`, or downloaded from the hub.
        model: the model that the adapter belongs to.

    Returns:
        An ActivScalar with the adapter's layers, on the CPU; a Composite if the adapter has several sites.

    Raises:
        FileNotFoundError: the folder or a file is missing.
        ValueError: a pickle; another kind of adapter, or one that trains more than (IA)³'s vectors; a damaged file;
            another model; modules that are not a site (keys, values, the MLP's inner width); factors that differ
            within a head or site, with the layer, the head and the spread.
    """
    folder = Path(folder)
    _check_config(folder)
    found = layout(model)
    places = _places(found)
    read: dict[str, dict[int, Tensor]] = {}
    for key, vector in sorted(_tensors(folder).items()):
        name = key.removeprefix(_BEFORE).removesuffix(_AFTER)
        site, layer = _place(places, name, vector, folder)
        sizes = found.heads[layer] or (0, 0)
        shape = (1, sizes[0] * sizes[1]) if site == "head" else (found.hidden_size, 1)
        if tuple(vector.shape) != shape:
            raise ValueError(f"{folder}: {name!r} has shape {tuple(vector.shape)}, expected {shape}: another model's")
        read.setdefault(site, {})[layer] = _tied(vector, sizes[0] if site == "head" else 1, layer, site, folder)
    parts = [_scalars(found, site, read[site], folder) for site in _SITES if site in read]
    if not parts:
        raise ValueError(f"{folder}: holds no (IA)³ vector")
    return parts[0] if len(parts) == 1 else Composite([(1.0, part) for part in parts])


def _check_config(folder: Path) -> None:
    """Raise an error unless the folder holds a plain (IA)³ adapter."""
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found, expected an adapter folder as PEFT's save_pretrained writes it")
    try:
        config = parsed(read_limited(path, LARGEST), finite=False)
        kind, others = config["peft_type"], config.get("modules_to_save")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: damaged or not an adapter's ({type(error).__name__}: {error})") from None
    if kind != "IA3":
        raise ValueError(f"{path}: got a {kind} adapter, expected IA3")
    if others:
        raise ValueError(
            f"{path}: the adapter replaces whole modules ({', '.join(others)}), which scalars cannot express"
        )


def _tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        if (folder / WEIGHTS_NAME).is_file():
            raise ValueError(
                f"{folder / WEIGHTS_NAME}: a pickle, which can run code when it is opened; load it with PEFT and save "
                "it again (save_pretrained writes safetensors)"
            )
        raise FileNotFoundError(f"{path}: not found, expected an adapter folder as PEFT's save_pretrained writes it")
    try:
        tensors = load_tensors(path.read_bytes())
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file ({error})") from None
    strange = [key for key in tensors if not (key.startswith(_BEFORE) and key.endswith(_AFTER))]
    if strange:
        raise ValueError(f"{path}: got the tensor {strange[0]!r}, expected only {_BEFORE}<module>{_AFTER}")
    return tensors


#: (module name, whether its vector scales the input) -> (site, layer)
_Places = dict[tuple[str, bool], tuple[str, int]]


def _places(found: ModelLayout) -> _Places:
    names = _names(found)
    places: _Places = {}
    for site in _SITES:
        for layer in range(found.n_layers):
            try:
                module = site_linear(found, site, layer)
            except ValueError:
                if site != "mlp_out":
                    raise
                continue  # the MLP's output is not that of one linear layer
            places[names[module], site == "head"] = (site, layer)
    return places


def _place(places: _Places, name: str, vector: Tensor, folder: Path) -> tuple[str, int]:
    """The site and layer of one of the adapter's vectors."""
    if vector.dim() != 2 or 1 not in vector.shape:
        raise ValueError(f"{folder}: {name!r} has shape {tuple(vector.shape)}, expected [1, in] or [out, 1]")
    place = places.get((name, vector.shape[0] == 1))
    if place is not None:
        return place
    if (name, False) in places:
        raise ValueError(
            f"{folder}: {name!r} is a feed-forward module here, so the MLP's inner width is scaled; activation scalars "
            "have no site there"
        )
    raise ValueError(
        f"{folder}: {name!r} is neither the output projection of an attention nor the last one of an MLP; activation "
        "scalars have no site there"
    )


def _tied(vector: Tensor, groups: int, layer: int, site: str, folder: Path) -> Tensor:
    """The common factor within each of `groups` equal parts of the vector, float64 [groups]."""
    parts = vector.reshape(groups, -1).double()
    low, high = parts.amin(1), parts.amax(1)
    wrong = (~(low == high)).nonzero()
    if len(wrong):
        head = int(wrong[0])
        at, unit = (f", head {head}", "head") if site == "head" else (f", {site}", "site")
        least, most = float(low[head]), float(high[head])
        raise ValueError(
            f"{folder}: layer {layer}{at}: factors from {least:.6g} to {most:.6g} (spread {most - least:.3g}), "
            f"expected one factor per {unit} ({len(wrong)} of {groups} have several)"
        )
    return low


def _scalars(found: ModelLayout, site: str, factors: dict[int, Tensor], folder: Path) -> ActivScalar:
    scalars = ActivScalar(found.location(site, sorted(factors)))
    scalars.restore({"alpha": torch.stack([factors[layer] - 1 for layer in scalars.location.layers])[:, None]})
    try:
        scalars.check_finite()
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    return scalars
