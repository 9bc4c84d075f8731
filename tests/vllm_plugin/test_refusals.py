"""What cannot be steered is refused: requests one by one, while the engine goes on, and engines at their start."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engines import ask, params, require_equal, scaling, serving
from test_compilation import configured
from tiny_llama import TinyLlama, save

import actscale_fast as af
from actscale_fast.integrations.vllm import (
    admission,
    compatibility,
    configuration,
    dropped_arguments,
    plugin,
    request_check,
    settings,
    worker,
)
from actscale_fast.integrations.vllm.request_options import PLAN


def test_bad_requests_are_refused_and_the_engine_goes_on(tiny: TinyLlama, folder: Path) -> None:
    from vllm.exceptions import VLLMValidationError

    prompt = [1, 2, 3, 4]
    alpha = af.load_intervention(folder / "a").alpha.detach()[:, 0]
    bad: list[tuple[dict[str, Any], str]] = [
        ({"actscale": "c"}, "got 'c', loaded are: a, b, p"),
        ({"actscale": "../a"}, "loaded are: a, b, p"),
        ({"actscale": "a", "actscale_strenght": 1}, "did you mean 'actscale_strength'"),
        ({"actscale": "a", PLAN: {}}, "reserved for the server"),
        ({"actscale": "a", "actscale_strength": float("nan")}, "expected a finite number"),
        ({"actscale": "a", "actscale_where": [4]}, "position 4 for a prompt of 4 tokens"),
        ({"actscale": "p", "actscale_where": "prompt"}, "positions of its own"),
        ({"actscale": "a+b", "actscale_strength": 1e25}, "infinite in float32"),
    ]
    with serving(tiny, folder) as llm:
        for extra, message in bad:
            with pytest.raises(VLLMValidationError, match=message):
                ask(llm, [(prompt, params(**extra))])
        good = ask(llm, [(prompt, params(actscale="a"))])[0]
        require_equal(tiny, prompt, good, scaling(alpha, 1.0))


def test_a_request_that_comes_another_way_is_refused(tiny: TinyLlama, folder: Path) -> None:
    with serving(tiny, folder) as llm:
        engine = llm.llm_engine
        made = engine.input_processor.process_inputs(
            "x", {"type": "token", "prompt_token_ids": [1, 2]}, params(), supported_tasks=("generate",)
        )
        made.sampling_params.extra_args = {"actscale": "a"}
        with pytest.raises(ValueError, match="did not pass vLLM's InputProcessor"):
            engine.add_request("x", made, made.sampling_params)
        assert admission.registry_of(llm).names() == ["a", "b", "p"]
        assert admission.admission_of(engine).n_steered == 0


def test_a_server_without_interventions_refuses_names(
    tiny: TinyLlama, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.exceptions import VLLMValidationError

    configured(tiny, folder, monkeypatch)  # registers the plug-in
    with serving(tiny, None) as llm:
        monkeypatch.setattr(plugin, "_registered", False)
        with pytest.raises(VLLMValidationError, match="no interventions are loaded"):
            ask(llm, [([1, 2], params(actscale="a"))])
        monkeypatch.setattr(plugin, "_registered", True)  # a process that had another engine
        with pytest.raises(ValueError, match="did not pass"):
            ask(llm, [([1, 2], params(actscale="a"))])
        with pytest.raises(ValueError, match="without ACTSCALE_INTERVENTIONS"):
            admission.registry_of(llm)


def test_a_worker_without_the_plug_in_does_not_start(
    tiny: TinyLlama, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(tiny, folder, monkeypatch)
    request_check.RequestCheck(config, torch.device("cpu"), False)
    monkeypatch.setattr(plugin, "_registered", False)
    with pytest.raises(RuntimeError, match="not active in this process"):
        request_check.RequestCheck(config, torch.device("cpu"), False)


def test_a_worker_refuses_a_configuration_that_it_does_not_know(
    tiny: TinyLlama, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(tiny, folder, monkeypatch)
    monkeypatch.setattr(configuration, "sources", lambda: "another")
    with pytest.raises(RuntimeError, match="another version of the plug-in"):
        worker.follow(SimpleNamespace(), config)
    config.additional_config = {}
    with pytest.raises(RuntimeError, match="was not made by vLLM's EngineArgs"):
        worker.follow(SimpleNamespace(), config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: setattr(c.parallel_config, "pipeline_parallel_size", 2), "pipeline parallelism"),
        (lambda c: setattr(c.parallel_config, "prefill_context_parallel_size", 2), "context parallelism"),
        (lambda c: setattr(c.parallel_config, "decode_context_parallel_size", 2), "context parallelism"),
        (lambda c: setattr(c.parallel_config, "enable_dbo", True), "microbatches"),
        (lambda c: setattr(c.parallel_config, "distributed_executor_backend", "ray"), "the executor 'ray'"),
        (lambda c: setattr(c.model_config, "enable_sleep_mode", True), "sleep mode"),
        (lambda c: setattr(c.model_config, "runner_type", "pooling"), "the runner 'pooling'"),
        (lambda c: setattr(c.cache_config, "kv_sharing_fast_prefill", True), "kv_sharing_fast_prefill"),
        (lambda c: setattr(c, "kv_transfer_config", object()), "KV transfer"),
        (lambda c: setattr(c, "lora_config", object()), "LoRA"),
    ],
)
def test_features_that_have_not_been_shown_to_work_are_refused(
    change: Callable[[Any], None], message: str, tiny: TinyLlama, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(tiny, None, monkeypatch)
    change(config)
    with pytest.raises(ValueError, match=f"cannot be steered with these settings: .*{message}"):
        configuration.configure(config, settings.Settings(folder))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda tiny, at: save(tiny, at / "x", torch.Generator(), site="attn_out"),
            "an ActivScalar at the site 'attn_out' cannot be served, expected 'head'; merge it",
        ),
        (
            lambda tiny, at: save(tiny, at / "x", torch.Generator(), "SteerVec", site="mlp_out"),
            "a SteerVec at the site 'mlp_out' cannot be served, expected 'head' or 'attn_out'",
        ),
        (lambda tiny, at: (save(tiny, at / "x", torch.Generator()), damage(at / "x")), "intervention.json"),
        (lambda tiny, at: save(tiny, at / "a+b", torch.Generator()), "cannot be used in a request"),
        (lambda tiny, at: at.rmdir(), "expected a folder"),
    ],
)
def test_a_folder_that_cannot_be_served_stops_the_start(
    make: Any, message: str, tiny: TinyLlama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "interventions"
    folder.mkdir()
    make(tiny, folder)
    with pytest.raises(ValueError, match=message):
        configured(tiny, folder, monkeypatch)


def damage(folder: Path) -> None:
    (folder / "intervention.json").write_text("{")


def test_an_unknown_version_or_build_of_vllm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    compatibility.require_version("0.32.0+cpu")
    for version in ("0.31.2", "0.33.0", "1.0"):
        with pytest.raises(ImportError, match=f"got vLLM {version}"):
            compatibility.require_version(version)
    known = (
        *compatibility.ADMISSION, *compatibility.HTTP, *compatibility.ATTENTION,
        *compatibility.RUNNER_V1, *compatibility.RUNNER_V2,
    )  # fmt: skip
    compatibility.require_signatures(known)
    for one in known:
        changed = one._replace(parameters=(*one.parameters[:-1], "renamed"))
        with pytest.raises(ImportError, match="is not one that the plug-in knows"):
            compatibility.require_signatures((changed,))
    with pytest.raises(ImportError, match=r"has no GPUModelRunner\.gone"):
        compatibility.require_signatures((compatibility.RUNNER_V1[0]._replace(name="GPUModelRunner.gone"),))


def test_requests_whose_options_vllm_would_drop_are_refused() -> None:
    from vllm.entrypoints.generate.generative_scoring.serving import GenerativeScoringRequest
    from vllm.entrypoints.openai.chat_completion.protocol import BatchChatCompletionRequest, ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.speech_to_text.transcription.protocol import TranscriptionRequest

    why, xargs, messages = dropped_arguments.why_dropped, {"actscale": "a"}, [{"role": "user", "content": "x"}]
    scoring = {"query": "x", "items": ["y"], "label_token_ids": [1, 2]}
    for request in (
        CompletionRequest(prompt=[1], use_beam_search=True, vllm_xargs=xargs),
        ChatCompletionRequest(messages=messages, use_beam_search=True, vllm_xargs=xargs),
        TranscriptionRequest.model_construct(use_beam_search=True, vllm_xargs=xargs),
    ):
        assert "a beam search cannot be steered" in (why("", request) or "")
    assert "expected it inside vllm_xargs" in (why("", CompletionRequest(prompt=[1], actscale="a")) or "")
    refused = GenerativeScoringRequest(**scoring, vllm_xargs=xargs)
    assert "generative scoring cannot be steered" in (why("ServingGenerativeScoring", refused) or "")
    batch = BatchChatCompletionRequest(messages=[messages], vllm_xargs=xargs)
    assert batch.to_chat_completion_request(messages).vllm_xargs == xargs
    for name, request in (
        ("", CompletionRequest(prompt=[1], use_beam_search=True)),
        ("", CompletionRequest(prompt=[1], vllm_xargs=xargs)),
        ("", batch),
        ("ServingGenerativeScoring", GenerativeScoringRequest(**scoring)),
    ):
        assert why(name, request) is None
