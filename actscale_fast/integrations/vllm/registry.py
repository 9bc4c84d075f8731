"""The interventions of a folder, by name, in a process that takes requests.

The folder is the truth. A name is looked up anew for each request: a folder that was replaced is read again, one that
was removed is not known any more. So interventions are added, replaced and removed by writing folders, while the server
runs and for all of its processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..._log import logger
from ..._suggestions import did_you_mean
from ...architectures.model_origin import public_name
from ...interventions import Intervention, load_intervention
from ...interventions.description import DESCRIPTION
from ...interventions.named import checked_name, is_name
from .._named_modules import refuse_named_module
from .request_options import NAME
from .served_model import ServedModel
from .settings import KINDS, SERVED_KINDS

_OTHER_SITES = [kind.split(":") for kind in SERVED_KINDS if ":" in kind]
_INSTEAD = "merge it into the model's weights (actscale_fast.merge) or run it in transformers (actscale_fast.patch)"


@dataclass(frozen=True)
class Entry:
    """A loaded intervention.

    Attributes:
        name: the name that requests use.
        path: its folder.
        intervention: the intervention, on the CPU.
        sha256: a digest of its description, which holds that of its tensors.
        stamp: inode, time and size of the description's file when it was read.
    """

    name: str
    path: Path
    intervention: Intervention
    sha256: str
    stamp: tuple[int, int, int]

    @property
    def kinds(self) -> tuple[str, ...]:
        """What its parts are, in words of `settings.SERVED_KINDS`."""
        return tuple(dict.fromkeys(kind_of(part) for part in self.intervention.singles))

    @property
    def n_rows(self) -> int:
        """The most rows that a request with this intervention alone may need."""
        return max(1, sum(part.location.n_slots for part in self.intervention.singles))


@dataclass(frozen=True)
class _Refused:
    """A folder that cannot be served, with the reason and the stamps of its files when it was read."""

    path: Path
    message: str
    stamps: tuple[tuple[str, int, int, int, int], ...]


class Registry:
    """The interventions of a folder.

    Args:
        folder: a folder whose subfolders `save_pretrained` wrote, or one such folder.
        served: the model that they must fit; None: it is checked later.
    """

    def __init__(self, folder: Path, served: ServedModel | None = None) -> None:
        self.folder = folder
        self.served = served
        self._entries: dict[str, Entry] = {}
        self._refused: dict[str, _Refused] = {}
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        """The names in the folder now, sorted."""
        return sorted(self._folders())

    def entries(self) -> list[Entry]:
        """All interventions of the folder, read where that has not been done.

        Raises:
            ValueError, OSError: one of them cannot be served; the message names it.
        """
        return [self.get(name) for name in self.names()]

    def get(self, name: str) -> Entry:
        """An intervention by its name, as its folder is now.

        Raises:
            ValueError: an unknown name, or an intervention that cannot be served.
            OSError: a file cannot be read.
        """
        folders = self._folders(name)
        if name not in folders:
            known = self.names()
            shown = ", ".join(known[:20]) + (f" and {len(known) - 20} more" if len(known) > 20 else "") or "none"
            raise ValueError(f"{NAME}: got {name[:80]!r}, loaded are: {shown}{did_you_mean(name, known)}")
        path = folders[name]
        if (entry := self._known(name, path)) is not None:
            return entry
        with self._lock:
            if (entry := self._known(name, path)) is not None:  # another thread has read it
                return entry
            stamp, stamps = _stamp(path), _stamps(path)
            # What was removed from the folder is not kept in memory.
            self._entries = {key: held for key, held in self._entries.items() if _is_saved(held.path)}
            self._refused = {key: held for key, held in self._refused.items() if key != name and _is_saved(held.path)}
            try:
                entry = self._read(name, path, stamp)
            except ValueError as error:
                self._refused = {**self._refused, name: _Refused(path, str(error), stamps)}
                raise
            self._entries = {**self._entries, name: entry}
            return entry

    def _known(self, name: str, path: Path) -> Entry | None:
        """What was read of a folder that has not changed since; without a lock, since entries are exchanged whole.

        Raises:
            ValueError: what was read was refused; it is not read again by each request that names it.
        """
        refused = self._refused.get(name)
        if refused is not None and refused.stamps == _stamps(path):
            raise ValueError(refused.message)
        entry = self._entries.get(name)
        return entry if entry is not None and entry.stamp == _stamp(path) else None

    async def prepare(self, names: Iterable[str]) -> None:
        """Read what requests name in another thread, where that is new, so that `get` then finds it.

        To read and check a replaced intervention takes 2 to 3 ms for the scalars of any model, and 50 ms for 2.6 MB of
        vectors (80 layers of 8192 numbers, on a busy CPU). A running server would send no tokens meanwhile.
        """
        for name in names:
            with contextlib.suppress(OSError, ValueError):  # `get` raises them again, where they become the answer
                path = self._folders(name).get(name)
                if path is not None and self._known(name, path) is None:
                    await asyncio.to_thread(self.get, name)

    def public(self, error: Exception) -> str:
        """The message of an error for a client, without the path of the folder on the server."""
        message = str(error)
        for folder in (self.folder, self.folder.resolve()):
            message = message.replace(f"{folder}/", "").replace(str(folder), "the folder of interventions")
        return message

    def _folders(self, wanted: str | None = None) -> dict[str, Path]:
        if (self.folder / DESCRIPTION).is_file():
            return {self.folder.resolve().name: self.folder}
        if wanted is not None:
            return {wanted: self.folder / wanted} if is_name(wanted) and _is_saved(self.folder / wanted) else {}
        return {path.name: path for path in self._subfolders() if is_name(path.name)}

    def _subfolders(self) -> Iterator[Path]:
        if not self.folder.is_dir():
            raise ValueError(f"{self.folder}: expected a folder of saved interventions")
        return (path for path in self.folder.iterdir() if not path.name.startswith(".") and _is_saved(path))

    def check_names(self) -> None:
        """Raise a ValueError where a subfolder's name cannot be used in a request."""
        if (self.folder / DESCRIPTION).is_file():
            return
        for path in self._subfolders():
            try:
                checked_name(path.name)
            except ValueError as error:
                raise ValueError(f"{path}: its name cannot be used in a request ({error})") from None

    def _read(self, name: str, path: Path, stamp: tuple[int, int, int]) -> Entry:
        from ...interventions.description import read_description

        try:
            intervention = load_intervention(path).requires_grad_(False)
            entry = Entry(name, path, intervention, read_description(path).sha256, stamp)
            require_served(intervention, self.served)
        except (ImportError, TypeError, ValueError) as error:
            raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
        if self.served is not None:
            _warn_of_another_model(entry, self.served)
        return entry


def kind_of(part: Intervention) -> str:
    """The class of an intervention, and its site where that is not the heads: "SteerVec:attn_out"."""
    name, site = type(part).__name__, part.location.site
    return name if site == "head" else f"{name}:{site}"


def require_served(intervention: Intervention, served: ServedModel | None) -> None:
    """Raise a ValueError where the plug-in cannot apply an intervention, or not to this model."""
    for part in intervention.singles:
        name, kind, location = type(part).__name__, kind_of(part), part.location
        article = "an" if name[0] in "AEIOU" else "a"
        if name not in SERVED_KINDS:
            classes = ", ".join(one for one in SERVED_KINDS if ":" not in one)
            raise ValueError(f"{article} {name} cannot be served, expected {classes}; {_INSTEAD}")
        if kind not in SERVED_KINDS:
            expected = " or ".join(["'head'", *(repr(site) for cls, site in _OTHER_SITES if cls == name)])
            raise ValueError(
                f"{article} {name} at the site {location.site!r} cannot be served, expected {expected}; {_INSTEAD}"
            )
        refuse_named_module("intervention", location, "vLLM")
        if part.n_groups is not None:
            raise ValueError(f"a stack of {part.n_groups} interventions cannot be served; save each on its own")
        if location.heads:
            raise ValueError("its layers differ in their heads, which the table cannot hold")
        part.check_finite()
        if served is not None:
            location.model.require(served.fingerprint(location.model.model_type))
            if kind not in served.kinds:
                raise ValueError(
                    f"{kind} needs room in the table, which was made for {', '.join(served.kinds)} when the server "
                    f"started; start it with {KINDS}={','.join([*served.kinds, kind])}"
                )


def _warn_of_another_model(entry: Entry, served: ServedModel) -> None:
    here = public_name(served.name)
    for origin in {part.location.origin for part in entry.intervention.singles}:
        if origin is not None and origin.name is not None and here is not None and origin.name != here:
            logger.warning(
                "%s: made for %s, served is %s of the same shape; what was measured there may not hold here",
                entry.name, origin.name, here,
            )  # fmt: skip


def _is_saved(path: Path) -> bool:
    return (path / DESCRIPTION).is_file()


def _stamp(path: Path) -> tuple[int, int, int]:
    found = (path / DESCRIPTION).stat()
    return found.st_ino, found.st_mtime_ns, found.st_size


def _stamps(path: Path) -> tuple[tuple[str, int, int, int, int], ...]:
    """Of all files: what is wrong may be mended in another file than the description, or by new permissions."""
    found = [(file.name, file.stat()) for file in path.iterdir()]
    return tuple(sorted((name, at.st_ino, at.st_mtime_ns, at.st_ctime_ns, at.st_size) for name, at in found))
