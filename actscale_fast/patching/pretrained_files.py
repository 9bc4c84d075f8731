"""What an ActScaleModel keeps in a folder beside its intervention, and how it gets to and from the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .._json import parsed_sealed, read_limited, read_sealed, write_sealed
from ..interventions import Intervention
from ..interventions.description import inside, number, read_description
from ..interventions.saving import save as save_intervention

CONFIG = "actscale_config.json"


def save(intervention: Intervention, folder: Path, strength: float, base_model: str | None) -> None:
    """Write an intervention, its strength, and the name of the model that it was made for."""
    digest = save_intervention(intervention, folder, float(strength))
    fields = {"format": 2, "strength": strength, "base_model_name_or_path": base_model, "intervention": digest}
    write_sealed(folder / CONFIG, fields)


def read_strength(folder: Path) -> float:
    """The strength that an ActScaleModel was saved with; 1 where an intervention was saved by itself.

    `intervention.json`, which commits a save, holds the strength. The config beside it is for other readers, but must
    be intact too. Earlier versions kept the strength in the config alone.
    """
    path = inside(folder, CONFIG)
    description = read_description(folder)
    told = description.fields.get("strength", 1.0)
    try:
        raw = read_limited(path)
    except FileNotFoundError:
        return float(told)
    try:
        config, is_sealed = parsed_sealed(raw)
        strength = number("strength", config["strength"])
        own = {"strength", "base_model_name_or_path"}
        if config.keys() != (own | {"format", "intervention"} if is_sealed else own):
            raise ValueError(f"its keys are {', '.join(sorted(config))}"[:300])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: damaged or not an ActScaleModel's ({error})") from None
    return strength if description.fields["format"] == 1 else float(told)


def local_folder(folder: str | Path, revision: str | None) -> Path:
    """The folder itself, or the download of the repository that has this id.

    Raises:
        FileNotFoundError: it looks like a repository's id, but there is no such repository.
    """
    path = Path(folder)
    if path.exists() or str(folder).count("/") != 1 or str(folder).startswith((".", "/")):
        return path
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(folder), revision=revision, allow_patterns=["*.safetensors", "*.json"]))
    except (OSError, ValueError) as error:  # no such repository, or no network
        raise FileNotFoundError(f"folder: {folder} is not a folder, and is not on the hub either ({error})") from error


def upload(folder: Path, intervention: Intervention, repo_id: str, api: Any, **kwargs: Any) -> str:
    """Add a model card to a saved folder and upload it; returns the address of the commit."""
    from huggingface_hub import ModelCard, ModelCardData

    base = read_sealed(folder / CONFIG)["base_model_name_or_path"]
    data = ModelCardData(library_name="actscale_fast", base_model=base, tags=["activation-scaling"])
    card = f"---\n{data.to_yaml()}\n---\n\n# {type(intervention).__name__}\n\n{intervention!r}\n"
    ModelCard(card, ignore_metadata_errors=True).save(folder / "README.md")
    kwargs.setdefault("commit_message", "Upload an intervention")
    return str(api.upload_folder(repo_id=repo_id, folder_path=str(folder), **kwargs))
