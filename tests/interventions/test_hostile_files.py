"""Folders that somebody made to do harm: refused quickly, by name, with nothing imported, run or read outside."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from model_zoo import randomised, tiny_model
from safetensors.torch import save
from torch import Tensor

import actscale_fast as af
from actscale_fast._json import sealed, write_sealed
from actscale_fast.das.boundless_das import BoundlessDAS

NAME = "intervention.json"


tiny_model("llama")  # imports what takes long


@pytest.fixture(autouse=True)
def quickly() -> Iterator[None]:
    begun = time.perf_counter()
    yield
    assert time.perf_counter() - begun < 20


@pytest.fixture
def little_memory() -> Iterator[None]:
    tracemalloc.start()
    yield
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100 << 20


def described(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """A save whose description is changed by somebody who makes the checksum agree."""
    randomised(af.ActivScalar.for_model(tiny_model("llama"))).save_pretrained(folder)
    told = json.loads((folder / NAME).read_text())
    change(told)
    write_sealed(folder / NAME, told)


def with_tensors(folder: Path, tensors: dict[str, Tensor] | bytes) -> None:
    payload = tensors if isinstance(tensors, bytes) else save(tensors)
    digest = hashlib.sha256(payload).hexdigest()
    name = f"intervention-{digest[:16]}.safetensors"
    described(folder, lambda told: told.update(tensors={"file": name, "sha256": digest}))
    (folder / name).write_bytes(payload)


def refused(folder: Path, match: str = r"\.(json|safetensors)") -> None:
    with pytest.raises(ValueError, match=match) as raised:
        af.load_intervention(folder)
    assert str(folder) in str(raised.value)
    assert len(str(raised.value)) < 2000


VALUES = [
    None, True, -1, 0, 1.5, 10**30, "", "head", [], [1], [True], [[1]], {}, {"0": 1}, ["0"], "\ud800", [None], [1.0],
    [10**40], [-(10**9)], {"a": {"b": []}},
]  # fmt: skip
PLACES = [
    ("format",), ("class",), ("module",), ("n_groups",), ("location",), ("tensors",), ("tensors", "file"),
    ("tensors", "sha256"), ("location", "site"), ("location", "layers"), ("location", "positions"),
    ("location", "generated"), ("location", "model"), ("location", "paths"), ("location", "heads"),
    ("location", "model", "model_type"), ("location", "model", "n_layers"), ("location", "model", "n_heads"),
    ("location", "model", "head_dim"), ("location", "model", "hidden_size"), ("strength",), ("unheard",),
]  # fmt: skip


#: Values that leave a scalar of two layers and four heads what it is.
HARMLESS: dict[str, Callable[[Any], bool]] = {
    "strength": lambda value: type(value) in (int, float) and abs(value) < 1e100,
    "module": lambda value: isinstance(value, str),
    "model_type": lambda value: isinstance(value, str),
    "n_groups": lambda value: value is None,
    "positions": lambda value: value is None or (value == [1] and type(value[0]) is int),
    "site": lambda value: value == "head",
    "heads": lambda value: value == {},
    "paths": lambda value: isinstance(value, dict) and all(isinstance(one, str) for one in value.values()),
}


@pytest.mark.parametrize("place", PLACES, ids=".".join)
def test_values_of_strange_types_are_refused_or_mean_the_same(place: tuple[str, ...], tmp_path: Path) -> None:
    described(tmp_path, lambda told: None)
    told = json.loads((tmp_path / NAME).read_text())
    for value in VALUES:
        changed = json.loads(json.dumps(told))
        inner = changed
        for name in place[:-1]:
            inner = inner[name]
        inner[place[-1]] = value
        write_sealed(tmp_path / NAME, changed)
        if place[-1] in HARMLESS and HARMLESS[place[-1]](value):
            assert af.load_intervention(tmp_path).alpha.shape == (2, 1, 4)
        else:
            refused(tmp_path)


@pytest.mark.parametrize("missing", ["format", "class", "module", "n_groups", "location", "tensors"])
def test_missing_fields_are_refused(missing: str, tmp_path: Path) -> None:
    described(tmp_path, lambda told: told.pop(missing))
    refused(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 1_000_000,
        b'{"checksum": ' * 100_000,
        b'{"format": 1, "class": ' + b'{"a":' * 5000 + b"1" + b"}" * 5001,
        b"",
        b"\x00" * 100,
        b"\xff\xfe{\x00}\x00",
        b'{"format": 1, "format": 2}',
        b'{"format": 1, "class": "ActivScalar", "module": NaN}',
        b'{"format": 1e999}',
        b'{"format": ' + b"1" * 10_000 + b"}",
        b"null",
        b'"text"',
        b"12",
        sealed({"format": 2}),
        sealed([{"format": 2, "class": "ActivScalar"}]),
    ],
    ids=lambda content: repr(content[:24]),
)
def test_json_that_is_deep_huge_or_no_object_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(content)
    refused(tmp_path, r"intervention\.json: damaged or not an intervention")


@pytest.mark.usefixtures("little_memory")
def test_a_description_of_any_size_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / NAME).open("wb") as file:
        file.truncate(1 << 40)  # takes no room on the disk
    refused(tmp_path, "expected at most")


@pytest.mark.usefixtures("little_memory")
def test_numbers_that_ask_for_much_memory_ask_in_vain(tmp_path: Path) -> None:
    def huge(told: dict[str, Any]) -> None:
        told["location"]["model"].update(n_heads=(1 << 24) - 1, head_dim=(1 << 24) - 1, n_layers=(1 << 24) - 1)
        told["n_groups"] = (1 << 31) - 1

    described(tmp_path, huge)
    refused(tmp_path, "holds tensors .* expected")
    described(tmp_path, lambda told: (huge(told), told.update({"class": "SteerVec"})))
    refused(tmp_path, "holds tensors .* expected")
    (place,) = tmp_path.glob("*.safetensors")
    with place.open("ab") as file:
        file.truncate(1 << 40)
    described_again = json.loads((tmp_path / NAME).read_text())
    described_again["location"]["model"].update(n_heads=4, head_dim=8, n_layers=2)
    described_again["n_groups"] = None
    write_sealed(tmp_path / NAME, described_again)
    refused(tmp_path, "expected at most")


@pytest.mark.usefixtures("little_memory")
def test_an_interchange_asks_for_no_rotation_that_is_not_there(tmp_path: Path) -> None:
    BoundlessDAS.for_model(tiny_model("llama"), layers=[0], positions=[-1]).save_pretrained(tmp_path)
    told = json.loads((tmp_path / NAME).read_text())
    told["location"]["model"]["hidden_size"] = 1 << 20
    write_sealed(tmp_path / NAME, told)
    refused(tmp_path, "holds tensors .* expected")
    told["location"]["positions"] = None
    write_sealed(tmp_path / NAME, told)
    refused(tmp_path)


@pytest.mark.parametrize(
    "tensors",
    [
        {"alpha": torch.zeros(2, 1, 4, dtype=torch.complex64)},
        {"alpha": torch.zeros(2, 1, 4, dtype=torch.int64)},
        {"alpha": torch.zeros(2, 1, 4, dtype=torch.bool)},
        {"alpha": torch.zeros(2, 1, 4, dtype=torch.float8_e4m3fn)},
        {"alpha": torch.full((2, 1, 4), torch.nan)},
        {"alpha": torch.full((2, 1, 4), 1e300, dtype=torch.float64)},
        {"alpha": torch.zeros(2, 4)},
        {"beta": torch.zeros(2, 1, 4)},
        {"alpha": torch.zeros(2, 1, 4), "more": torch.zeros(1)},
        {},
        b"",
        b"\xff" * 8,
        (1 << 62).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (8).to_bytes(8, "little") + b'{"a": 1}',
        (40).to_bytes(8, "little") + b"[" * 40,
    ],
    ids=lambda tensors: repr(tensors)[:40],
)
def test_tensors_of_other_types_shapes_and_names_are_refused(tensors: Any, tmp_path: Path) -> None:
    with_tensors(tmp_path, tensors)
    refused(tmp_path)


def test_half_precision_and_double_tensors_are_read_as_float32(tmp_path: Path) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        with_tensors(tmp_path / str(dtype), {"alpha": torch.full((2, 1, 4), 0.5, dtype=dtype)})
        loaded = af.load_intervention(tmp_path / str(dtype))
        assert loaded.alpha.dtype == torch.float32
        assert torch.equal(loaded.alpha, torch.full((2, 1, 4), 0.5))


def test_sixty_thousand_positions_are_saved_loaded_and_stacked_in_seconds(tmp_path: Path) -> None:
    model = tiny_model("llama")
    scalars = randomised(af.ActivScalar.for_model(model, positions=range(60_000)))
    scalars.save_pretrained(tmp_path)
    assert torch.equal(af.load_intervention(tmp_path).alpha, scalars.alpha)
    assert af.stack([scalars, scalars]).alpha.shape[0] == 2
    told = json.loads((tmp_path / NAME).read_text())
    told["location"]["positions"] = [7] * 60_000
    write_sealed(tmp_path / NAME, told)
    refused(tmp_path, "positions: got 7 more than once")
    with pytest.raises(ValueError, match=r"positions: got 0, 1, .* and 29990 more more than once"):
        af.ActivScalar.for_model(model, positions=[*range(30_000), *range(30_000)])


@pytest.mark.parametrize("version", [1, 2])
def test_a_part_that_is_listed_over_and_over_is_refused(version: int, tmp_path: Path) -> None:
    model = tiny_model("llama")
    (af.ActivScalar.for_model(model) + af.SteerVec.for_model(model)).save_pretrained(tmp_path)
    told = json.loads((tmp_path / NAME).read_text())
    for times in (2**16, 3):
        told["parts"] = told["parts"][:1] * times
        if version == 1:
            told["parts"] = [part | {"folder": "part-0"} for part in told["parts"]]
            (tmp_path / NAME).write_text(json.dumps({"format": 1, "class": "Composite", "parts": told["parts"]}))
        else:
            write_sealed(tmp_path / NAME, told)
        if times > 1024 or version == 1:
            refused(tmp_path, "parts: ")
        else:
            assert len({id(part) for _, part in af.load_intervention(tmp_path).pairs}) == 1  # read once
    many = af.interventions.Composite([(1.0, af.ActivScalar.for_model(model))] * 2000)
    with pytest.raises(ValueError, match="parts: got 2000, expected at most 1024"):
        many.save_pretrained(tmp_path / "many")
    assert not (tmp_path / "many" / NAME).exists()


@pytest.mark.parametrize(
    "part",
    [
        {"factor": float("nan")}, {"factor": float("inf")}, {"factor": 10**400}, {"factor": True}, {"factor": "1"},
        {"factor": None}, {"folder": ".."}, {"folder": "."}, {"folder": "/etc"}, {"folder": "part-0/../part-0"},
        {"folder": ["part-0"]}, {"folder": ""}, {"sha256": "0" * 64}, {"sha256": None}, {"more": 1},
    ],
    ids=repr,
)  # fmt: skip
def test_parts_with_strange_fields_are_refused(part: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model("llama")
    (af.ActivScalar.for_model(model) + af.SteerVec.for_model(model)).save_pretrained(tmp_path)
    told = json.loads((tmp_path / NAME).read_text())
    told["parts"][0].update(part)
    write_sealed(tmp_path / NAME, told)
    refused(tmp_path)


def test_composites_inside_composites_are_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    (af.ActivScalar.for_model(model) + af.SteerVec.for_model(model)).save_pretrained(tmp_path / "inner")
    raw = (tmp_path / "inner" / NAME).read_bytes()
    for depth in range(3):
        digest = hashlib.sha256(raw).hexdigest()
        folder = tmp_path / f"outer-{depth}" / f"part-{digest[:16]}"
        folder.mkdir(parents=True)
        (folder / NAME).write_bytes(raw)
        parts = [{"folder": folder.name, "factor": 1.0, "sha256": digest}]
        raw = write_sealed(folder.parent / NAME, {"format": 2, "class": "Composite", "parts": parts})
        refused(tmp_path / f"outer-{depth}", "a Composite cannot be part of another")


def test_nothing_outside_the_folder_is_read(tmp_path: Path) -> None:
    model = tiny_model("llama")
    good, bad = tmp_path / "good", tmp_path / "bad"
    af.ActivScalar.for_model(model).save_pretrained(good)
    (tensors,) = (path.name for path in good.glob("*.safetensors"))
    bad.mkdir()
    (bad / NAME).symlink_to(good / NAME)
    refused(bad, "a link to .*, which is outside the folder")
    (bad / NAME).unlink()
    (bad / NAME).write_bytes((good / NAME).read_bytes())
    (bad / tensors).symlink_to(good / tensors)
    refused(bad, "a link to .*, which is outside the folder")
    (bad / tensors).unlink()
    (bad / tensors).symlink_to(tensors)  # to itself
    with pytest.raises(OSError, match=tensors):
        af.load_intervention(bad)
    for name in ("../good/" + tensors, str(good / tensors), "..", tensors + "\0", ""):
        described(bad, lambda told, name=name: told["tensors"].update(file=name))  # type: ignore[misc]
        refused(bad, "a name made of its checksum")
    whole = af.ActivScalar.for_model(model) + af.SteerVec.for_model(model)
    whole.save_pretrained(tmp_path / "whole")
    part = next((tmp_path / "whole").glob("part-*"))
    part.rename(tmp_path / "moved")
    part.symlink_to(tmp_path / "moved")
    refused(tmp_path / "whole", "a link")


def test_a_snapshot_of_the_hub_whose_files_are_links_to_blobs_is_read(tmp_path: Path) -> None:
    model = tiny_model("llama")
    whole = randomised(af.ActivScalar.for_model(model)) + randomised(af.SteerVec.for_model(model))
    snapshot, blobs = tmp_path / "snapshots" / "0a1b", tmp_path / "blobs"
    whole.save_pretrained(snapshot)
    blobs.mkdir()
    for number, path in enumerate(sorted(path for path in snapshot.rglob("*") if path.is_file())):
        path.rename(blobs / str(number))
        path.symlink_to(os.path.relpath(blobs / str(number), path.parent))
    loaded = af.load_intervention(snapshot)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), whole.parameters(), strict=True))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes by name are of POSIX systems")
def test_pipes_and_folders_in_place_of_files_do_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / NAME)
    refused(tmp_path, r"intervention\.json: not a regular file")
    (tmp_path / NAME).unlink()
    (tmp_path / NAME).mkdir()
    refused(tmp_path, r"intervention\.json: not a regular file")
    (tmp_path / NAME).rmdir()
    af.ActivScalar.for_model(tiny_model("llama")).save_pretrained(tmp_path)
    (place,) = tmp_path.glob("*.safetensors")
    place.unlink()
    os.mkfifo(place)
    refused(tmp_path, r"\.safetensors: not a regular file")
    os.mkfifo(tmp_path / "fit.safetensors")
    import tiny
    from fit_cases import conflicts, run

    with pytest.raises(ValueError, match=r"fit\.safetensors.*not a regular file"):
        run(tiny.llama(), conflicts(4), checkpoint=tmp_path / "fit.safetensors")


@pytest.mark.parametrize("module", ["this", "actscale_fast.integrations.unheard", "actscale_fast.cli", "os.path"])
def test_no_module_is_imported_that_a_file_names(module: str, tmp_path: Path) -> None:
    described(tmp_path, lambda told: told.update({"module": module, "class": "Unheard"}))
    before = set(sys.modules)
    refused(tmp_path, "unknown class 'Unheard'")
    assert set(sys.modules) == before


def test_classes_of_this_packages_integrations_are_found(tmp_path: Path) -> None:
    import subprocess

    from actscale_fast.integrations.jola import JoLA

    JoLA.for_model(tiny_model("llama")).save_pretrained(tmp_path)
    code = f"import actscale_fast as af; print(type(af.load_intervention({str(tmp_path)!r})).__name__)"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "JoLA", done.stderr


@pytest.mark.parametrize(
    "change",
    [
        {"folder": ".."}, {"folder": "/etc"}, {"folder": "a/b"}, {"folder": 3}, {"label": None}, {"chosen": []},
        {"files": {}}, {"files": {"history.json": 1, "intervention.json": 2}}, {"evaluation": {"baseline": {}}},
        {"evaluation": 3}, {"error": False}, {"task": 4},
    ],
    ids=repr,
)  # fmt: skip
def test_indexes_of_sweeps_with_strange_fields_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    import damage

    damage.write_sweep(tmp_path, 0)
    told = json.loads((tmp_path / "sweep.json").read_text())
    told[1].update(change)
    write_sealed(tmp_path / "sweep.json", told)
    with pytest.raises(ValueError, match=rf"{tmp_path}.*\.json"):
        af.load_sweep(tmp_path)
    for content in ([], {"fits": 1}, [{"a": 1}, 3], [[1]]):
        (tmp_path / "sweep.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"sweep\.json"):
            af.load_sweep(tmp_path)
