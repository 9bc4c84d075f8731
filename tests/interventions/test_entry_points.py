"""Classes of other packages: found by the entry points that installed packages declare, and by nothing else."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from model_zoo import randomised, tiny_model

import actscale_fast as af
from actscale_fast._json import write_sealed
from actscale_fast.interventions import Intervention

MODULE = """
from pathlib import Path
from actscale_fast.interventions import ActivScalar
Path(__file__).with_suffix(".imported").touch()
class {name}(ActivScalar):
    pass
"""


def installed(folder: Path, distribution: str, group: str = "actscale_fast.interventions", **classes: str) -> None:
    """A distribution in a folder of sys.path that declares classes, each `module:Class`, with their modules."""
    info = folder / f"{distribution}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    lines = [f"{name} = {value}" for name, value in classes.items()]
    (info / "entry_points.txt").write_text("\n".join([f"[{group}]", *lines, ""]))
    for value in classes.values():
        module, name = value.split(":")
        (folder / f"{module}.py").write_text(MODULE.format(name=name))


def imported(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*.imported")}


def saved_as(folder: Path, name: str, module: str = "anything") -> None:
    randomised(af.ActivScalar.for_model(tiny_model("llama"))).save_pretrained(folder)
    told = json.loads((folder / "intervention.json").read_text())
    write_sealed(folder / "intervention.json", told | {"class": name, "module": module})


def loaded_elsewhere(folder: Path, path: Path) -> str:
    """The class of a saved intervention in a fresh process that finds packages in `path` too."""
    code = f"import actscale_fast as af; print(type(af.load_intervention({str(folder)!r})).__name__)"
    places = [str(path), str(Path(af.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(places)}
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, env=environment)
    return done.stdout.strip() or done.stderr


def test_a_class_that_an_installed_package_declares_is_found(tmp_path: Path) -> None:
    installed(tmp_path / "site", "own-package", Halved="halved:Halved", Other="other:Other")
    saved_as(tmp_path / "saved", "Halved")
    assert loaded_elsewhere(tmp_path / "saved", tmp_path / "site") == "Halved"
    assert imported(tmp_path / "site") == {"halved"}  # and not the other module


@pytest.mark.parametrize("name", ["Unheard", "halved", "Halved2", "os"])
def test_other_names_import_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site"
    installed(site, "own-package", Halved="halved:Halved")
    installed(site, "scripts", group="console_scripts", Unheard="unheard:Unheard", os="unheard:Unheard")
    monkeypatch.syspath_prepend(str(site))
    saved_as(tmp_path / "saved", name, module="halved")
    before = set(sys.modules)
    with pytest.raises(ValueError, match=f"intervention.json: unknown class '{name}'"):
        af.load_intervention(tmp_path / "saved")
    assert imported(site) == set()
    assert set(sys.modules) == before


def test_the_module_that_a_file_names_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site"
    installed(site, "own-package", Halved="halved:Halved")
    monkeypatch.syspath_prepend(str(site))
    saved_as(tmp_path / "saved", "ActivScalar", module="halved")
    assert type(af.load_intervention(tmp_path / "saved")) is af.ActivScalar
    assert imported(site) == set()


def test_a_name_of_two_packages_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site"
    installed(site, "one", Halved="halved:Halved")
    installed(site, "two", Halved="other:Halved")
    monkeypatch.syspath_prepend(str(site))
    saved_as(tmp_path / "saved", "Halved")
    with pytest.raises(ValueError, match=r"class Halved is declared by several installed packages: .*halved:Halved"):
        af.load_intervention(tmp_path / "saved")
    assert imported(site) == set()


def test_an_entry_point_without_its_class_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site"
    installed(site, "own-package", Halved="halved:Renamed")
    monkeypatch.syspath_prepend(str(site))
    saved_as(tmp_path / "saved", "Halved")
    with pytest.raises(ValueError, match="unknown class 'Halved'"):
        af.load_intervention(tmp_path / "saved")
    Intervention.classes.pop("Renamed")


@pytest.mark.parametrize("name", ["BoundlessDAS", "JoLA"])
def test_this_package_declares_the_classes_that_are_not_imported_with_it(name: str, tmp_path: Path) -> None:
    from actscale_fast.integrations.jola import JoLA

    cls = {"BoundlessDAS": af.BoundlessDAS, "JoLA": JoLA}[name]
    cls.for_model(tiny_model("llama"), layers=[0], positions=[-1]).save_pretrained(tmp_path / "saved")
    assert loaded_elsewhere(tmp_path / "saved", tmp_path) == name


def test_every_class_outside_the_interventions_folder_is_declared() -> None:
    described = Path(__file__).resolve().parents[2] / "pyproject.toml"
    if not described.exists():
        pytest.skip("needs the source tree")
    declared = tomllib.loads(described.read_text())["project"]["entry-points"]["actscale_fast.interventions"]
    package = Path(af.__file__).parent
    classes = [
        (path, node, {base.id for base in node.bases if isinstance(base, ast.Name)})
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    ]
    known = {"Intervention"}
    while more := {node.name for _, node, bases in classes if bases & known} - known:
        known |= more
    found = {
        node.name: ".".join(path.relative_to(package.parent).with_suffix("").parts) + f":{node.name}"
        for path, node, _ in classes
        if node.name in known and path.parent.name != "interventions"
    }
    assert declared == found
