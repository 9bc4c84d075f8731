"""A folder of interventions by name: what it accepts, and that adding and removing are atomic."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch

import actscale_fast as af
from actscale_fast.interventions import named
from actscale_fast.interventions.description import DESCRIPTION, read_description


@pytest.fixture(scope="module")
def scalars() -> af.ActivScalar:
    made = af.ActivScalar.for_model(tiny.llama())
    with torch.no_grad():
        made.alpha.normal_(generator=torch.Generator().manual_seed(0))
    return made


def test_what_was_added_can_be_loaded_by_its_name(scalars: af.ActivScalar, tmp_path: Path) -> None:
    root = tmp_path / "new" / "interventions"
    digest = named.add_named(root, "capitals-1.0", scalars)
    scalars.save_pretrained(tmp_path / "saved")
    assert named.add_named(root, "b 2", tmp_path / "saved") == digest == read_description(root / "b 2").sha256
    (root / "notes").mkdir()
    (root / "readme.txt").write_text("not an intervention")
    assert named.saved_names(root) == ["b 2", "capitals-1.0"]
    torch.testing.assert_close(af.load_intervention(root / "b 2").alpha, scalars.alpha, rtol=0, atol=0)


def test_a_saved_strength_is_kept(tmp_path: Path) -> None:
    source = Path(__file__).parent.parent / "data" / "saved" / "ActScaleModel"
    named.add_named(tmp_path, "adapted", source)
    assert read_description(tmp_path / "adapted").fields["strength"] == read_description(source).fields["strength"]


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "a\\b", "a+b", "../a", ".hidden", " a", "a\n", "x" * 129, None, 3]
)
def test_names_that_are_paths_or_joins_are_refused(name: object, scalars: af.ActivScalar, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"name: got .*, expected 1 to 128 printable"):
        named.add_named(tmp_path, name, scalars)
    with pytest.raises(ValueError, match=r"name: got .*, expected 1 to 128 printable"):
        named.remove_named(tmp_path, name)
    assert not list(tmp_path.iterdir())


def test_an_intervention_is_replaced_only_on_request(scalars: af.ActivScalar, tmp_path: Path) -> None:
    before = named.add_named(tmp_path, "a", scalars)
    with pytest.raises(FileExistsError, match=r"name: .* already holds 'a'; pass replace to replace it"):
        named.add_named(tmp_path, "a", scalars)
    assert named.add_named(tmp_path, "a", -2.0 * scalars, replace=True) != before
    assert len(list((tmp_path / "a").iterdir())) == 2


def test_a_damaged_source_changes_nothing(scalars: af.ActivScalar, tmp_path: Path) -> None:
    before = named.add_named(tmp_path / "root", "a", scalars)
    scalars.save_pretrained(tmp_path / "damaged")
    file = next((tmp_path / "damaged").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="damaged or truncated"):
        named.add_named(tmp_path / "root", "a", tmp_path / "damaged", replace=True)
    assert read_description(tmp_path / "root" / "a").sha256 == before


def test_what_was_removed_is_gone_and_other_files_stay(scalars: af.ActivScalar, tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        named.add_named(tmp_path, name, scalars)
    (tmp_path / "b" / "heads.png").write_bytes(b"")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "c")
    for name in ("a", "b", "linked"):
        named.remove_named(tmp_path, name)
    assert named.saved_names(tmp_path) == ["c"]
    assert not (tmp_path / "a").exists()
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["heads.png"]
    with pytest.raises(FileNotFoundError, match="holds no 'cc'; did you mean 'c'"):
        named.remove_named(tmp_path, "cc")


def test_the_description_is_removed_before_the_tensors(
    scalars: af.ActivScalar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named.add_named(tmp_path, "a", scalars)
    gone: list[str] = []
    unlink = Path.unlink

    def record(path: Path, missing_ok: bool = False) -> None:
        gone.append(path.name)
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", record)
    named.remove_named(tmp_path, "a")
    assert gone[0] == DESCRIPTION
    assert len(gone) == 2


def test_a_subfolder_with_a_bad_name_is_refused_by_name(scalars: af.ActivScalar, tmp_path: Path) -> None:
    scalars.save_pretrained(tmp_path / "a+b")
    with pytest.raises(ValueError, match=r"a\+b: name: got 'a\+b', expected"):
        named.saved_names(tmp_path)
