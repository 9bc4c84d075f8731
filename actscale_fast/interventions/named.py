"""A folder of interventions by name: `<root>/<name>` is what `save_pretrained` wrote.

A server reads such a folder, and a command adds to it and removes from it while the server runs. Both ways are atomic:
`intervention.json` is renamed into place last, and removed first.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from .._files import exclusive, naming
from .._json import shown
from .._suggestions import did_you_mean
from . import saving
from .base import Intervention, load_intervention
from .description import DESCRIPTION, read_description

_LONGEST = 128


def is_name(name: object) -> bool:
    """Whether an intervention may be called so: never a path, and without the "+" that joins names in a request."""
    if not isinstance(name, str) or not 0 < len(name) <= _LONGEST or name.startswith(".") or name != name.strip():
        return False
    return name.isprintable() and not any(mark in name for mark in "+/\\")


def checked_name(name: object) -> str:
    """The name, if an intervention may be called so.

    Raises:
        ValueError: it may not.
    """
    if not isinstance(name, str) or not is_name(name):
        raise ValueError(
            f"name: got {shown(name)}, expected 1 to {_LONGEST} printable characters without +, / and \\, "
            "with neither a dot at the beginning nor spaces at the ends"
        )
    return name


def saved_names(root: Path) -> list[str]:
    """The names in a folder of interventions, sorted; subfolders without an `intervention.json` are not counted.

    Raises:
        OSError: the folder cannot be read; the message names it.
        ValueError: a subfolder holds an intervention but has a name that none may have.
    """
    try:
        with os.scandir(root) as entries:
            found = sorted(entry.name for entry in entries if (root / entry.name / DESCRIPTION).is_file())
    except OSError as error:
        raise naming(error, root) from error
    for name in found:
        try:
            checked_name(name)
        except ValueError as error:
            raise ValueError(f"{root / name}: {error}") from None
    return found


def add_named(root: Path, name: str, source: Path | Intervention, *, replace: bool = False) -> str:
    """Put an intervention into a folder of interventions; returns the SHA-256 of its description.

    Args:
        root: the folder of interventions, created if it does not exist.
        name: its name there.
        source: the intervention, or a folder that `save_pretrained` wrote, which is read and checked first.
        replace: whether an intervention of that name may be there already.

    Raises:
        FileExistsError: the name is taken, and `replace` is False.
        ValueError, FileNotFoundError, OSError: a bad name, a source that cannot be read (see
            `af.load_intervention`), or a folder that cannot be written; nothing is changed then.
    """
    target = root / checked_name(name)
    strength = None
    if isinstance(source, Path):
        strength = read_description(source).fields.get("strength")
        source = load_intervention(source)
    saving.made_folder(root)
    with exclusive(root):
        if not replace and (target / DESCRIPTION).exists():
            raise FileExistsError(f"name: {root} already holds {name!r}; pass replace to replace it")
        return saving.save(source, target, strength)


def remove_named(root: Path, name: str) -> None:
    """Remove an intervention from a folder of interventions, its description first.

    Files in its folder that `save_pretrained` did not write stay. If the name is a link to a folder, only the link is
    removed.

    Raises:
        FileNotFoundError: there is no such intervention.
        ValueError, OSError: a bad name, or a file that cannot be removed.
    """
    folder = root / checked_name(name)
    with exclusive(root):
        if not (folder / DESCRIPTION).exists():
            known = saved_names(root) if root.is_dir() else []
            raise FileNotFoundError(f"name: {root} holds no {name!r}{did_you_mean(name, known)}")
        if folder.is_symlink():
            folder.unlink()
            return
        (folder / DESCRIPTION).unlink()
        saving.remove_files(folder)
        with contextlib.suppress(OSError):
            folder.rmdir()
