"""repeng's control vectors and llama.cpp's files of them: the same logits, the same bits there and back."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path
from typing import Any

import model_zoo
import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from model_zoo import IDS, logits, randomised, tiny_model

import actscale_fast as af
from actscale_fast.integrations.repeng import from_repeng, load_gguf, save_gguf, to_repeng

# repeng 0.4.0, the newest on the package index, names np.float_ in annotations, which NumPy 2 took away.
with pytest.MonkeyPatch.context() as patched:
    if not hasattr(np, "float_"):
        patched.setattr(np, "float_", np.float64, raising=False)
    from repeng import ControlModel, ControlVector

FAMILIES = ["llama", "gpt2", "qwen3"]
#: ControlModule needs one row of position ids for each row of the batch; transformers makes one row for all.
PLACES = torch.arange(IDS.shape[1]).repeat(len(IDS), 1)


def control_vector(model: Any, layers: tuple[int, ...] = (0, 1), seed: int = 3, model_type: str = "") -> ControlVector:
    source = np.random.default_rng(seed)
    width = model.config.hidden_size
    directions = {layer: source.standard_normal(width).astype(np.float32) for layer in layers}
    return ControlVector(model_type=model_type or model.config.model_type, directions=directions)


def controlled(model: Any, vector: ControlVector, coefficient: float, call: Any) -> torch.Tensor:
    """What `call(model)` gives under repeng; its wrapping of the layers is undone."""
    wrapped = ControlModel(model, list(vector.directions))
    try:
        wrapped.set_control(vector, coefficient)
        with torch.no_grad():
            return call(wrapped)
    finally:
        wrapped.unwrap()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("coefficient", [1.0, -1.7, 0.0])
def test_the_logits_are_those_of_repeng(family: str, coefficient: float) -> None:
    model = tiny_model(family)
    vector = control_vector(model)
    expected = controlled(model, vector, coefficient, lambda m: m(IDS, position_ids=PLACES).logits)
    with af.patch(model, from_repeng(vector, model), strength=coefficient):
        got = logits(model)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert (coefficient == 0) == torch.allclose(got, logits(model), atol=1e-3)


def test_in_bfloat16_ours_is_at_least_as_exact() -> None:
    model, exact = tiny_model(dtype=torch.bfloat16), tiny_model(dtype=torch.bfloat16).double()
    vector = control_vector(model)
    expected = controlled(model, vector, 0.3, lambda m: m(IDS, position_ids=PLACES).logits)
    ours = from_repeng(vector, model)
    with af.patch(model, ours, strength=0.3):
        got = logits(model)
    with af.ops.use_backend("reference"), af.patch(exact, ours, strength=0.3):
        truth = logits(exact)
    assert (got - truth).abs().max() <= 2 * (expected - truth).abs().max()


def test_generation_is_that_of_repeng_with_left_padding_and_without() -> None:
    model = tiny_model()
    vector = control_vector(model)
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    ids[0, :2], mask[0, :2] = 0, 0
    given: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    expected = controlled(model, vector, 2.0, lambda m: m.generate(ids, **given))
    with af.patch(model, from_repeng(vector, model), strength=2.0):
        assert torch.equal(model.generate(ids, **given), expected)
    assert not torch.equal(model.generate(ids, **given), expected)


def test_repeng_vectors_come_back_bit_for_bit() -> None:
    model = tiny_model()
    vector = control_vector(model)
    back = to_repeng(from_repeng(vector, model))
    assert back == vector
    assert all(value.dtype == np.float32 for value in back.directions.values())
    ours = randomised(af.SteerVec.for_model(model, "residual", [1]))
    assert torch.equal(from_repeng(to_repeng(ours), model).vectors, ours.vectors)


def test_layers_without_a_direction_are_left_alone_and_negative_ones_count_from_the_end() -> None:
    model = tiny_model()
    last = from_repeng(control_vector(model, (1,)), model)
    assert last.location.layers == (1,)
    counted = from_repeng(control_vector(model, (-1,)), model)
    assert counted.location == last.location
    assert torch.equal(counted.vectors, last.vectors)


def test_what_is_in_the_vector_is_copied() -> None:
    model = tiny_model()
    vector = control_vector(model)
    ours = from_repeng(vector, model)
    before = ours.vectors.clone()
    vector.directions[0][:] = 0
    to_repeng(ours).directions[1][:] = 0
    assert torch.equal(ours.vectors, before)


def test_files_are_read_by_both_bit_for_bit(tmp_path: Path) -> None:
    model = tiny_model()
    vector = control_vector(model, (1,))
    vector.export_gguf(tmp_path / "theirs.gguf")
    ours = load_gguf(tmp_path / "theirs.gguf", model)
    assert to_repeng(ours) == vector
    save_gguf(ours, tmp_path / "ours.gguf")
    assert ControlVector.import_gguf(tmp_path / "ours.gguf") == vector
    assert torch.equal(load_gguf(tmp_path / "ours.gguf", model).vectors, ours.vectors)


def test_a_file_is_what_the_loader_of_llama_cpp_takes(tmp_path: Path) -> None:
    """common_control_vector_load_one: names direction.n with n > 0, F32, one dimension, all of one length."""
    model = tiny_model(num_hidden_layers=4)
    ours = randomised(af.SteerVec.for_model(model, "residual"))
    with torch.no_grad():
        ours.vectors[0] = 0  # layer 0: none in llama.cpp
    save_gguf(2 * ours, tmp_path / "vector.gguf")
    reader = GGUFReader(tmp_path / "vector.gguf")
    assert {t.name: (t.tensor_type.name, t.shape.tolist()) for t in reader.tensors} == {
        f"direction.{layer}": ("F32", [32]) for layer in (1, 2, 3)
    }
    assert reader.fields["general.architecture"].contents() == "controlvector"
    assert reader.fields["controlvector.model_hint"].contents() == "llama"
    assert reader.fields["controlvector.layer_count"].contents() == 3


def written(path: Path, *, architecture: str = "controlvector", hint: str | None = "llama", **tensors: Any) -> Path:
    writer = GGUFWriter(path, architecture)
    if hint is not None:
        writer.add_string("controlvector.model_hint", hint)
    for name, (value, kind) in tensors.items():
        writer.add_tensor(name.replace("_", "."), value, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_half_precision_is_read_and_other_tensors_passed_over(tmp_path: Path) -> None:
    value = np.linspace(-1, 1, 32, dtype=np.float16)
    path = written(tmp_path / "v.gguf", direction_1=(value, None), mean_1=(value, None))
    assert load_gguf(path, tiny_model()).vectors.flatten().tolist() == value.tolist()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"architecture": "llama"}, "architecture 'llama', expected 'controlvector'"),
        ({"hint": None}, "has no controlvector.model_hint"),
        ({"hint": "gemma2"}, "made for 'gemma2', the model is 'llama'"),
        ({}, "layers: got none"),
        ({"direction_1": (np.zeros(8, np.float32), None)}, r"layer 1: got vectors of shape \(8,\), expected"),
        ({"direction_9": (np.zeros(32, np.float32), None)}, "layers: got 9, expected -2 to 1"),
        ({"direction_one": (np.zeros(32, np.float32), None)}, "tensor direction.one of type F32, expected direction.n"),
        ({"direction_1": (np.zeros(32, np.int8), None)}, "tensor direction.1 of type I8, expected"),
        ({"direction_1": (np.full(32, np.nan, np.float32), None)}, "values are not finite"),
    ],
)
def test_a_file_that_is_not_for_the_model_is_refused(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    path = written(tmp_path / "v.gguf", **given)
    with pytest.raises(ValueError, match=f"v.gguf: .*{message}"):
        load_gguf(path, tiny_model())


def test_another_hint_is_taken_where_it_is_named(tmp_path: Path) -> None:
    path = written(tmp_path / "v.gguf", direction_1=(np.ones(32, np.float32), None))
    model = tiny_model("mistral")
    with pytest.raises(ValueError, match="made for 'llama', the model is 'mistral'"):
        load_gguf(path, model)
    assert load_gguf(path, model, model_type="llama").location.model.model_type == "mistral"
    with pytest.raises(ValueError, match="model_hint is 'llama', expected 'qwen2'"):
        load_gguf(path, model, model_type="qwen2")


def test_damaged_files_are_named(tmp_path: Path) -> None:
    model = tiny_model()
    save_gguf(randomised(af.SteerVec.for_model(model, "residual", [1])), tmp_path / "v.gguf")
    whole = (tmp_path / "v.gguf").read_bytes()
    for name, content in {"empty": b"", "text": b"hello, world", "short": whole[:-60], "head": whole[:20]}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}: damaged or not a GGUF file"):
            load_gguf(tmp_path / name, model)
    with pytest.raises(FileNotFoundError):
        load_gguf(tmp_path / "missing.gguf", model)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vector = randomised(af.SteerVec.for_model(tiny_model(), "residual", [1]))
    save_gguf(vector, tmp_path / "v.gguf")
    before = (tmp_path / "v.gguf").read_bytes()
    monkeypatch.setattr(GGUFWriter, "write_tensors_to_file", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_gguf(2 * vector, tmp_path / "v.gguf")
    assert (tmp_path / "v.gguf").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["v.gguf"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: af.SteerVec.for_model(m, "head"), "its site is 'head'; .* only has residual"),
        (lambda m: af.SteerVec.for_model(m, "residual", positions=[0]), "it has positions"),
        (lambda m: af.SteerVec.stack([af.SteerVec.for_model(m, "residual")] * 2), "got a stack of 2"),
        (lambda m: randomised(af.SteerVec.for_model(m, "residual")), "steers layer 0"),
        (lambda m: af.SteerVec.for_model(m, "residual", [0]), "only has layer 0"),
    ],
)
def test_what_the_format_cannot_say_is_refused(tmp_path: Path, make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"steer_vec: .*{message}"):
        save_gguf(make(tiny_model()), tmp_path / "v.gguf")
    assert not list(tmp_path.iterdir())


def test_what_is_no_vector_of_the_model_is_refused() -> None:
    model = tiny_model()
    with pytest.raises(TypeError, match="steer_vec: got ActivScalar, expected a SteerVec"):
        to_repeng(af.ActivScalar.for_model(model))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="made for 'gpt2', the model is 'llama'"):
        from_repeng(control_vector(model, model_type="gpt2"), model)
    with pytest.raises(ValueError, match="layers: got 1 more than once"):
        from_repeng(control_vector(model, (1, -1)), model)


def test_files_need_no_repeng(tmp_path: Path) -> None:
    """In a process where repeng cannot be found: files work, its class is refused by name."""
    code = f"""
import sys
sys.modules["repeng"] = None
import importlib.metadata
found = importlib.metadata.version
def version(name):
    if name == "repeng":
        raise importlib.metadata.PackageNotFoundError(name)
    return found(name)
importlib.metadata.version = version
sys.path.insert(0, {str(Path(model_zoo.__file__).parent)!r})
from model_zoo import tiny_model
import actscale_fast as af
from actscale_fast.integrations import repeng
model = tiny_model()
vector = af.SteerVec.for_model(model, "residual", [1])
repeng.save_gguf(vector, {str(tmp_path / "v.gguf")!r})
repeng.load_gguf({str(tmp_path / "v.gguf")!r}, model)
try:
    repeng.to_repeng(vector)
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "repeng is not installed; expected repeng" in done.stdout


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.3.1")
    with pytest.raises(ImportError, match=r"got repeng 0\.3\.1, expected repeng"):
        from_repeng(ControlVector("llama", {}), tiny_model())
