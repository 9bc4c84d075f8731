"""The benchmark harness: nothing wrong is timed, the figures add up, the tables come from the files."""

from __future__ import annotations

import contextlib
import functools
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from actscale_fast import ops
from actscale_fast.verification.accuracy import accuracy
from benchmarks import __main__ as command, cases, gpu_check, memory, models, results, runner, timing
from benchmarks.case import Case, Problem, Setting, Variant, by_rows, repeated
from benchmarks.cases import loss, sweep as sweep_case
from benchmarks.counting import counted
from benchmarks.head_gating import HeadGating
from benchmarks.plain import Exact, Plain, PlainFits
from benchmarks.steps import Ours, Work, products, twin

CPU = torch.device("cpu")


def double(x: Tensor) -> Tensor:
    return x * 2


def problem(*others: Variant) -> Problem:
    x = torch.linspace(-1, 1, 1000)
    return Problem(
        [Variant("eager", lambda: (double(x),)), *others], lambda: (double(x.double()),), n_bytes=8000, flops=1000
    )


def record(*others: Variant, **case: Any) -> dict[str, Any]:
    setting = Setting("a thousand", lambda device: problem(*others), note="a note", quick=True)
    return runner.run_case(Case("doubling", "Twice x", [setting], **case), CPU, quick=True, say=lambda line: None)


def entries(made: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {entry["name"]: entry for entry in made["settings"][0]["variants"]}


def test_a_wrong_variant_is_shown_and_never_timed() -> None:
    calls = []

    def wrong() -> tuple[Tensor]:
        calls.append(1)
        return (torch.linspace(-1, 1, 1000) * 2.001,)

    made = record(Variant("wrong", wrong))
    entry = entries(made)["wrong"]
    assert len(calls) == 1
    assert "seconds" not in entry
    assert entry["status"].startswith("wrong: result 0 is off by 0.0005")
    assert "not timed: wrong" in results.table(made)


def test_a_variant_that_raises_is_a_line_of_the_table_and_the_others_are_timed() -> None:
    def broken() -> tuple[Tensor]:
        raise NotImplementedError("no such kernel")

    found = entries(record(Variant("broken", broken)))
    assert found["broken"]["status"] == "failed: NotImplementedError: no such kernel"
    assert found["eager"]["seconds"]["call"]["median"] > 0


def test_a_baseline_that_raises_stops_the_run() -> None:
    setting = Setting("none", lambda device: Problem([Variant("eager", lambda: (1 / 0,))], lambda: (), 8, 1))  # type: ignore[arg-type,return-value]
    with pytest.raises(ZeroDivisionError):
        runner.run_case(Case("broken", "Broken", [setting]), CPU, say=lambda line: None)


def test_ratios_bandwidth_and_the_yardstick_follow_from_the_medians() -> None:
    def slow() -> tuple[Tensor]:
        time.sleep(0.005)
        return (double(torch.linspace(-1, 1, 1000)),)

    found = entries(record(Variant("torch.compile", slow), Variant("bare", slow, checked=False)))
    own, base = found["torch.compile"], found["eager"]
    median = own["seconds"]["call"]["median"]
    assert median >= 0.005
    assert own["times_eager"] == pytest.approx(base["seconds"]["call"]["median"] / median)
    assert base["times_compile"] == pytest.approx(1 / own["times_eager"])
    assert own["gb_per_s"] == pytest.approx(8000 / median / 1e9)
    assert own["share_of_copy"] == pytest.approx(found["copy"]["seconds"]["call"]["median"] / median)
    assert found["bare"]["status"] == found["copy"]["status"] == "yardstick"
    low, high = own["seconds"]["call"]["low"], own["seconds"]["call"]["high"]
    assert low <= median <= high


def test_the_verdict_allows_twice_the_baseline_and_no_more() -> None:
    exact, base = (torch.ones(3, dtype=torch.float64),), [(torch.full((3,), 1 + 1e-3),)]
    assert not accuracy((torch.full((3,), 1 + 2e-3),), exact, base).reason
    assert accuracy((torch.full((3,), 1 + 3e-3),), exact, base).reason
    assert accuracy((torch.tensor([1.0, torch.nan, 1.0]),), exact, base).reason
    assert "shape" in accuracy((torch.ones(2),), exact, base).reason
    assert "expected 1" in accuracy((), exact, base).reason
    assert not accuracy((torch.full((3,), 1 + 3e-3),), exact, base, (1e4,)).reason  # float32 sums of terms of that size


def test_the_verdict_counts_the_roundings_of_the_terms_in_their_own_dtype() -> None:
    exact, base = (torch.ones(3, dtype=torch.float64),), [(torch.ones(3),)]
    off = (torch.full((3,), 1.03),)
    assert accuracy(off, exact, base, (1.0,)).reason
    assert not accuracy(off, exact, base, (1.0,), torch.bfloat16).reason  # 4 ulps of 2^-7
    assert accuracy((torch.full((3,), 1.04),), exact, base, (1.0,), torch.bfloat16).reason


@pytest.mark.parametrize("fails", [False, True])
def test_what_a_setting_holds_open_is_closed_after_it_also_where_it_fails(fails: bool) -> None:
    seen: list[str] = []
    resources = contextlib.ExitStack()
    resources.callback(seen.append, "closed")

    def call() -> tuple[Tensor]:
        if fails:
            raise ArithmeticError
        seen.append("called")
        return (torch.ones(1),)

    made = Problem([Variant("eager", call)], lambda: (torch.ones(1),), 4, 1, resources=resources)
    setting = Setting("one", lambda device: made, quick=True)
    with pytest.raises(ArithmeticError) if fails else contextlib.nullcontext():
        runner.run_case(Case("ones", "Ones", [setting]), CPU, quick=True, say=lambda line: None)
    assert seen.count("closed") == 1
    assert seen[-1] == "closed"


def test_a_case_whose_calls_take_seconds_takes_fewer_samples_of_them() -> None:
    def slow() -> tuple[Tensor]:
        time.sleep(0.2)
        return (double(torch.linspace(-1, 1, 1000)),)

    found = entries(record(Variant("slow", slow), fewest_samples=2))
    assert found["slow"]["seconds"]["call"]["samples"] == 2


def test_variants_take_turns_under_their_own_backend() -> None:
    seen: list[tuple[str, str]] = []

    def remember(name: str) -> tuple[Tensor]:
        seen.append((name, ops.get_backend()))
        time.sleep(0.003)
        return (torch.ones(1),)

    before = ops.get_backend()
    variants = [[Variant("a", lambda: remember("a"))], [Variant("b", lambda: remember("b"), "reference")]]
    times = timing.in_turns(variants, timing.WallClock(), timing.Budget(seconds=0.03, fewest=4, most=4))
    assert [t.samples for t in times] == [4, 4]
    assert {backend for name, backend in seen if name == "b"} == {"reference"}
    assert {backend for name, backend in seen if name == "a"} == {before}
    assert {name for name, _ in seen[-4:]} == {"a", "b"}


def test_peak_memory_counts_what_is_alive_at_once() -> None:
    x = torch.ones(1 << 18)  # 1 MiB

    def call() -> tuple[Tensor]:
        y = (x + 1) + 1  # the first sum dies when the second is there
        y = y + 1
        return (y,)

    assert 2 << 20 <= memory.peak_bytes(call, CPU) < (2 << 20) + 1024  # scalars of the additions beside


def test_every_case_declares_settings_and_a_quick_one() -> None:
    for name in cases.NAMES:
        case = cases.load(name)
        assert case.name == name
        for device in ("cpu", "cuda"):
            assert any(setting.quick and device in setting.devices for setting in case.settings)
        labels = [setting.label for setting in case.settings]
        assert len(set(labels)) == len(labels)
    with pytest.raises(KeyError, match="case: got 'nothing', expected one of loss"):
        cases.load("nothing")


def test_a_setting_runs_only_on_the_devices_it_names() -> None:
    settings = [Setting(label, lambda device: problem(), devices=(label,)) for label in ("cpu", "cuda")]
    made = runner.run_case(Case("doubling", "Twice x", settings), CPU, say=lambda line: None)
    assert [setting["label"] for setting in made["settings"]] == ["cpu"]


def small(value: Any) -> Any:
    """A size, or a shape of them, that a CPU computes at once; anything else as it is."""
    if isinstance(value, tuple):
        return tuple(small(part) for part in value)
    if isinstance(value, models.Shape):
        return value.tiny()
    return min(value, 96) if isinstance(value, int) and not isinstance(value, bool) else value


def for_gpus_alone() -> list[Any]:
    return [
        pytest.param(setting, id=f"{name}: {setting.label}")
        for name in cases.NAMES
        for setting in cases.load(name).settings
        if "cpu" not in setting.devices
    ]


@pytest.mark.parametrize("setting", for_gpus_alone())
def test_a_setting_for_gpus_is_right_at_a_small_size(setting: Setting) -> None:
    make = setting.make
    assert isinstance(make, functools.partial)
    made = make.func(*map(small, make.args), CPU)
    with made.resources:
        exact, terms = made.exact(), made.terms() if made.terms else None
        baseline = tuple(result.clone() for result in made.variants[0].call())
        for variant in made.variants:
            with timing.chosen_backend(variant):
                if not variant.checked:
                    assert all(torch.isfinite(result).all() for result in variant.call()), variant.name
                elif variant.name != "torch.compile, cached reference":
                    assert not accuracy(variant.call(), exact, [baseline], terms, made.dtype).reason, variant.name
    assert made.n_bytes > 0


def tiny_work(fits: int = 1, *, layers: tuple[int, ...] = (0, 1, 2), last_only: bool = False) -> Work:
    """Prompts of 3 to 7 tokens of a tiny Llama; the fits differ in prompts, scalars and λ_M."""
    model = models.random_model(models.LLAMA_3_8B.tiny(), CPU).float()
    data = models.RandomPrompts(8, 7, 96, CPU)
    data.prompts = [prompt[row % 5 :] for row, prompt in enumerate(data.prompts)]
    starts = torch.randn(fits, len(layers), 1, 4, generator=torch.Generator().manual_seed(1))
    rows = [[(row + fit) % 8 for row in range(6)] for fit in range(fits)]
    return Work(model, data, rows, starts, [0.1 * (fit + 1) for fit in range(fits)], layers, last_only)


@pytest.mark.parametrize(("layers", "last_only"), [((0, 1, 2), False), ((1, 2), False), ((0, 1, 2), True)])
def test_all_ways_of_a_step_give_the_terms_and_gradients_of_float64(layers: tuple[int, ...], last_only: bool) -> None:
    work = tiny_work(2, layers=layers, last_only=last_only)
    exact = Exact(work)
    baselines = [PlainFits(work)(), PlainFits(work, stacked=True)()]
    with contextlib.ExitStack() as resources:
        for together in (False, True):
            ours = Ours(work, resources, together=together)
            for _ in range(2):  # every call starts from the same scalars
                assert not accuracy(ours(), exact.results(), baselines, exact.terms()).reason
        assert not accuracy(baselines[1], exact.results(), baselines[:1], exact.terms()).reason
    for result, size in zip(exact.results(), exact.terms(), strict=True):
        assert result.abs().max() <= size
    assert exact.results()[2].abs().min() > 0


def test_an_engine_on_a_twin_leaves_the_model_and_its_weights_alone() -> None:
    work = tiny_work()
    before = Plain(work)()
    with contextlib.ExitStack() as resources:
        ours = Ours(work, resources)
        ours()
        assert all("forward" not in module.__dict__ for module in work.model.modules())
        pairs = zip(work.model.parameters(), twin(work.model).parameters(), strict=True)
        assert all(own is other for own, other in pairs)
        assert all(torch.equal(a, b) for a, b in zip(before, Plain(work)(), strict=True))


def test_the_yardstick_is_every_linear_layer_once_forward_and_once_back() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    work = tiny_work()
    with FlopCounterMode(display=False) as counted:
        products(work)()
    head = work.model.lm_head.weight.numel()
    weights = sum(module.weight.numel() for module in work.model.modules() if isinstance(module, torch.nn.Linear))
    padded_tokens, prompts = 2 * 6 * 7, 2 * 6
    assert counted.get_total_flops() == 4 * ((weights - head) * padded_tokens + head * prompts)


def test_open_gates_leave_the_model_as_it_is_and_an_update_closes_none_that_lambda_holds() -> None:
    work = tiny_work()
    gating = HeadGating(work)
    with torch.no_grad():
        gating.gates.fill_(40.0)  # σ(40) is 1 in float32
        log_p = work.model(**gating.arguments).logits[:, -2].log_softmax(-1)
    expected = -log_p.gather(1, gating.target[:, None]).mean() - 0.1 * 4.0 * gating.gates.numel()
    rounding = 4 * torch.finfo(torch.float32).eps * float(-log_p.min() + 4.8)  # of the terms' size
    assert abs(float(gating()[0]) - float(expected)) <= rounding
    gating.gates.data.fill_(0.0)
    gating()
    assert (gating.gates > 0).all()


def test_prompts_of_the_demo_are_made_as_long_as_wanted() -> None:
    from tiny import tokenizer

    texts = ["The capital of A is Paris", "what is the answer"]
    whole = models._led_up_to(tokenizer(), "The capital of B is", texts, 12)
    assert len(whole.split()) == 12
    assert whole.endswith(" The capital of B is")
    with pytest.raises(ValueError, match="tokens: got 50, and no text"):
        models._led_up_to(tokenizer(), "The capital of B is", texts, 50)


def test_a_sweep_has_every_seed_with_every_weight() -> None:
    work = tiny_work()
    made = sweep_case.grid(work.model, work.data, 8, 4, 0.1)
    points = {(tuple(rows), weight) for rows, weight in zip(made.rows, made.minimality, strict=True)}
    assert len(points) == 8
    assert len({rows for rows, _ in points}) == 2
    assert len({tuple(start.flatten().tolist()) for start in made.starts}) == 8


def test_a_kernel_that_takes_log_probabilities_is_fed_what_it_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    divergence = functools.partial(torch.nn.functional.kl_div, reduction="none", log_target=True)
    monkeypatch.setattr(loss, "liger_divergence", lambda device, reduction: divergence)
    for uniform in (True, False):
        made = loss.make(4, 61, torch.float32, uniform, CPU)
        (variant,) = (v for v in made.variants if v.name == "Liger's KL")
        assert not accuracy(variant.call(), made.exact(), [made.variants[0].call()], made.terms and made.terms()).reason


def test_rows_in_parts_are_joined_and_rows_are_repeated() -> None:
    x, y = torch.arange(14.0).view(7, 2), torch.arange(7)
    doubled, ids = by_rows(lambda a, b: (a * 2, b), x, y, width=2, elements=6)
    assert torch.equal(doubled, x * 2)
    assert torch.equal(ids, y)
    assert torch.equal(repeated(x[:3], 7), x[[0, 1, 2, 0, 1, 2, 0]])


def test_a_record_survives_its_file_and_becomes_the_table_between_the_markers(tmp_path: Path) -> None:
    path = results.save(record(), tmp_path / "results")
    assert path.name.startswith("doubling-")
    assert path.stat().st_size < 5000
    (loaded,) = results.load_all(path.parent)
    assert loaded["environment"]["versions"]["torch"] == torch.__version__
    document = tmp_path / "README.md"
    opening, closing = results.markers("doubling")
    document.write_text(f"# Title\n{opening}\nold\n{closing}\ntail\n", encoding="utf-8")
    assert results.fill(document, [loaded])
    text = document.read_text(encoding="utf-8")
    assert "| a thousand [1] | eager |" in text
    assert "[1] a note" in text
    assert "old" not in text
    assert text.startswith("# Title\n")
    assert text.endswith(f"{closing}\ntail\n")
    assert not results.fill(document, [loaded])


@pytest.mark.skipif(not results.FOLDER.is_dir(), reason="needs the source tree")
def test_every_file_directly_in_the_results_folder_is_a_record_that_the_tables_are_made_from() -> None:
    records = results.load_all()
    assert all(results.table(record) for record in records)
    assert {"loss", "linear", "scale_heads"} <= {record["case"] for record in records}


def test_a_damaged_results_file_or_marker_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"broken\.json: not a benchmark record"):
        results.load_all(tmp_path)
    document = tmp_path / "README.md"
    document.write_text(results.markers("all")[0], encoding="utf-8")
    with pytest.raises(ValueError, match="without <!-- /benchmarks:all -->"):
        results.fill(document, [])


def test_the_command_runs_one_case_writes_its_file_and_prints_its_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    try:
        status = command.main(
            ["--case", "overhead", "--quick", "--threads", "1", "--device", "cpu", "--out", str(tmp_path)]
        )
    finally:
        torch.set_num_threads(threads)
    assert status == 0
    assert "| variant | us (20–80 %) |" in capsys.readouterr().out
    (path,) = tmp_path.glob("overhead-*.json")
    made = json.loads(path.read_text(encoding="utf-8"))
    assert made["environment"]["threads"] == 1
    assert made["quick"]


def test_a_wrong_option_is_refused_with_the_choices(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--case", "nothing"], ["--threads", "0"]):
        with pytest.raises(SystemExit) as caught:
            command.main(arguments)
        assert caught.value.code == 2
    assert "expected at least 1" in capsys.readouterr().err


def test_kernels_and_bytes_are_those_of_the_formula_and_the_kernels_those_that_the_profiler_sees() -> None:
    x = torch.randn(3, 5, 4, 8, dtype=torch.bfloat16).requires_grad_()
    alpha = torch.zeros(1, 1, 4, requires_grad=True)
    n_bytes = x.numel() * 2

    def forward() -> tuple[Tensor, ...]:
        return ((x.float() * (1 + alpha)[..., None]).to(x.dtype),)

    def step() -> tuple[Tensor, ...]:
        (y,) = forward()
        return torch.autograd.grad(y, (x, alpha), torch.ones_like(y))

    def fused() -> tuple[Tensor, ...]:
        return (ops.scale_heads(x, alpha),)

    plain, ours = counted(forward), counted(fused)
    assert plain.kernels == 4  # widen, 1 + α, multiply, narrow
    assert plain.n_bytes == 10 * n_bytes + 3 * 4 * alpha.numel()  # 1 + 2, 2 + 2, 2 + 1 of x; α twice, 1 + α twice
    assert (ours.kernels, ours.n_bytes) == (1, 2 * n_bytes + 4 * alpha.numel())
    for call in (forward, step):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
            call()
        leaves = [e.name for e in recorded.events() if e.name.startswith("aten::") and not e.cpu_children]
        views = {"aten::empty_strided", "aten::as_strided", "aten::empty", "aten::detach", "detach"}
        assert counted(call).kernels == sum(name not in views for name in leaves), leaves


def test_the_gpu_check_keeps_each_parts_outcome_and_goes_on_after_a_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    commands = {"fine": "print('well')", "failing": "raise SystemExit('no kernel image')", "late": "input(); input()"}
    late = "import time; time.sleep(60)"
    made = [
        gpu_check.Part(name, [sys.executable, "-c", late if name == "late" else code], 2.0 if name == "late" else 30.0)
        for name, code in commands.items()
    ]
    monkeypatch.setattr(gpu_check, "parts", lambda device, out: made)
    assert gpu_check.main(["--device", "cpu", "--out", str(tmp_path)]) == 1
    (path,) = tmp_path.glob("gpu-check-*.json")
    found = {part["part"]: part for part in json.loads(path.read_text())["parts"]}
    assert {name: part["status"] for name, part in found.items()} == {
        "fine": "ok", "failing": "failed (1)", "late": "timed out",
    }  # fmt: skip
    assert found["failing"]["output"] == ["no kernel image"]


def test_the_gpu_check_takes_the_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sources of a checkout have no compiled kernels unless they are built in place."""
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    commands = [list(part.command) for part in gpu_check.parts("cuda", tmp_path) if "harness" not in part.name]
    assert len(commands) == 4
    assert all("-P" in command[: command.index("-m")] for command in commands)
    code = "import sys; from pathlib import Path; print({str(Path.cwd())} & set(sys.path))"
    found = gpu_check.run(gpu_check.Part("path", [sys.executable, "-P", "-c", code], 30))
    assert found["output"] == ["set()"]


def test_the_gpu_check_needs_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 2
    assert "PyTorch finds no GPU here" in capsys.readouterr().err


def test_all_parts_of_the_gpu_check_fit_into_ten_minutes(tmp_path: Path) -> None:
    assert sum(part.seconds for part in gpu_check.parts("cuda", tmp_path)) <= 600
