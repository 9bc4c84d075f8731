"""The public names are promises: a name that is missing here was lost.

Each list is written out, so that a name cannot be removed by accident; a new name or parameter is added to it.
"""

from __future__ import annotations

import importlib
import inspect
import re
import typing
from typing import Any

import pytest

import actscale_fast as af

NAMES = {
    "actscale_fast": """
        ActScaleConfig ActScaleModel ActivScalar Attribution BoundlessDAS Checkpoint CircuitMetrics Composite
        ConflictEvaluation DynScalar Evaluation Example Execution FitResult HeadComparison HeadFaithfulness
        HeadInterchange HeadResult HeadSelection InstructionVectors InterchangeResult Intervention LatentResult
        LayerChoice LayerScore MemoryPlan Means Objective Projection RunTwice ScoredHead SteerVec StressResult StressRow
        SweepFit SweepResult act_add attribution circuit_metrics compare_heads decode_latent evaluate
        evaluate_conflicts fit fit_interchange gather_sweep get_actscale_model get_backend head_faithfulness
        head_mask instruction_vectors latent_vectors load_demo_model load_examples load_intervention load_sweep
        mean_activations mean_centring mean_vector merge minimality_path ops patch perplexity plan_memory plots
        reproduce save_examples save_mib_scores select_heads set_backend source_activations stack stress sweep tasks
        unmerge use_backend verify_kernels Verification
    """,
    "actscale_fast.ops": """
        ReferenceStatistics dynamic_scale get_backend intervention_loss kl_div_from_logits linear_intervention_loss
        linear_kl_div proximal_adam_ reference_statistics scale_channels scale_heads set_backend use_backend
    """,
    "actscale_fast.tasks": """
        ALIGNED_CONFLICT_TEMPLATES ALIGNED_INDIRECT_OBJECT_TEMPLATES CONFLICT_KINDS CONFLICT_TEMPLATES Example
        GREATER_THAN_TEMPLATES INDIRECT_OBJECT_TEMPLATES KNOWLEDGE_CONFLICT_TEMPLATES PRICE_TEMPLATE TaskSplit
        conflict_kind country_capital_conflicts greater_than indirect_object_identification knowledge_conflicts
        load_examples name_order price_tagging save_examples
    """,
    "actscale_fast.plots": """
        Measured PathPoint attribution comparison head_scores heatmap history overlap pareto path strengths
    """,
}

#: The functions and classes of each integration, and the library that importing it needs.
INTEGRATIONS = {
    "aisteer360": ("", "load save"),
    "causal_head_gating": ("", "HeadGates fit_gates gated_nll scored"),
    "jola": ("", "JoLA"),
    "lm_eval": ("lm_eval", "SteeredLM accuracies"),
    "nnsight": ("nnsight", "steer"),
    "peft": ("peft", "Accelerated FusedLinear accelerate from_peft_ia3 to_peft_ia3"),
    "pyvene": ("pyvene", "Accelerated ScaleIntervention accelerate from_pyvene load_pyvene to_pyvene"),
    "repeng": ("", "from_repeng load_gguf save_gguf to_repeng"),
    "serving": ("", "ScalarTable"),
    "steering_vectors": ("steering_vectors", "from_steering_vectors to_steering_vectors"),
    "trainer": ("", "ProximalCallback"),
    "transformer_lens": ("transformer_lens", "for_transformer_lens head_patching head_scaling hooks"),
    "vllm": ("", ""),  # a plug-in: vLLM calls it
}

#: The parameters of each function, in the order of its first version; new ones may be added.
PARAMETERS = {
    "verify_kernels": "device quick progress supervisor",
    "ops.scale_heads": "x alpha strength shift group",
    "ops.dynamic_scale": "x weight bias strength group return_scalars",
    "ops.intervention_loss": (
        "logits reference_logits correct wrong direction margin exclude_answers kl scalars inplace_gradient weights"
    ),
    "ops.reference_statistics": (
        "hidden weight correct wrong bias softcap logit_scale exclude_answers kl keep_logits chunk_bytes"
    ),
    "ops.linear_intervention_loss": (
        "hidden weight reference correct wrong direction margin bias softcap logit_scale exclude_answers kl "
        "scalars chunk_bytes"
    ),
    "ops.kl_div_from_logits": (
        "logits reference_logits temperature reduction kl softcap labels ignore_index row_weight inplace_gradient"
    ),
    "ops.linear_kl_div": (
        "hidden weight reference_hidden reference_weight bias reference_bias temperature reduction kl softcap "
        "logit_scale labels ignore_index row_weight chunk_bytes"
    ),
    "ops.scale_channels": "x weight",
    "ops.proximal_adam_": "parameter gradient exp_avg exp_avg_sq step lr betas eps l1",
    "head_mask": "model mask projection layers_path",
    "attribution": (
        "model tokenizer examples site layers positions intervention objective knock_out batch_size cache_bytes "
        "progress"
    ),
    "select_heads": (
        "model tokenizer examples method k layers strength strengths validation max_kl direction seed batch_size "
        "progress"
    ),
    "head_faithfulness": "model tokenizer examples selection layers ablations n_random seed batch_size",
    "evaluate_conflicts": "model tokenizer examples intervention batch_size progress",
    "stress": (
        "model tokenizer intervention examples strength direction perturbations own_perturbations texts prompts "
        "unrelated accuracies min_control min_gain max_perplexity_ratio max_kl max_accuracy_drop max_drop "
        "max_side_effect seed batch_size progress"
    ),
    "circuit_metrics": "model tokenizer examples scores layers ablation absolute batch_size",
    "save_mib_scores": "path model scores layers parallel",
    "compare_heads": (
        "model tokenizer examples test methods k layers strengths validation max_kl direction seed batch_size progress "
        "options"
    ),
    "sweep": (
        "model tokenizer examples grid objective intervention steps lr batch_size seed schedule betas tolerance "
        "patience warm_start at_once points evaluate_on folder checkpoint_every cache_bytes spill_bytes memory_bytes "
        "capture distributed progress"
    ),
    "minimality_path": "model tokenizer examples n smallest objective intervention steps batch_size seed betas",
    "reproduce": "model tokenizer folder quick size progress",
    "act_add": "model tokenizer positive negative layer coefficient padding paths",
    "mean_centring": (
        "model tokenizer target training layers site coefficient positions generated skip batch_size max_tokens "
        "progress paths"
    ),
    "latent_vectors": (
        "model tokenizer sentences layer every_step start ends steps lr restarts seed batch_size progress paths"
    ),
    "instruction_vectors": "model tokenizer with_instruction without_instruction layers batch_size progress paths",
    "fit_interchange": (
        "model tokenizer examples das epochs steps batch_size accumulate rotation_lr boundary_lr boundary_weight "
        "temperature warmup seed checkpoint checkpoint_every progress"
    ),
    "source_activations": "model tokenizer das texts batch_size progress",
    "set_backend": "name",
    "get_backend": "",
    "use_backend": "name",
    "Intervention.for_model": "model site layers positions generated projection layers_path mlp",
    "HeadInterchange.for_model": "model site layers positions generated projection layers_path mlp",
    "RunTwice.for_prompts": "model longest layers projection layers_path",
    "BoundlessDAS.for_model": "model site layers positions generated seed projection layers_path mlp",
    "Example": "prompt correct wrong source messages where",
    "tasks.country_capital_conflicts": (
        "tokenizer n_train n_test seed templates test_fraction whole_names aligned split several_tokens"
    ),
    "tasks.indirect_object_identification": "tokenizer n_train n_test seed templates orders aligned",
    "tasks.knowledge_conflicts": "tokenizer n_train n_test kinds seed test_fraction whole_names several_tokens",
    "tasks.conflict_kind": "example",
    "tasks.greater_than": "tokenizer n_train n_test seed templates aligned",
    "tasks.name_order": "tokenizer n_train n_test seed",
    "tasks.price_tagging": "tokenizer n_train n_test seed variable",
    "Objective": "margin faithfulness minimality exclude_answers kl directions sparsity",
    "fit": (
        "model tokenizer examples intervention objective steps lr batch_size seed schedule betas tolerance "
        "patience accumulate cache_bytes spill_bytes memory_bytes capture recompute checkpoint checkpoint_every "
        "distributed progress"
    ),
    "evaluate": "model tokenizer examples intervention batch_size progress",
    "get_actscale_model": "model config",
    "patch": "model intervention strength group",
    "Intervention.save_pretrained": "folder",
    "load_intervention": "folder",
    "merge": "model intervention strength",
    "unmerge": "model",
    "load_demo_model": "cache_dir progress",
    "perplexity": "model tokenizer texts prompts batch_size paths",
    "stack": "interventions",
    "ActivScalar.top": "k",
    "ActivScalar.to_frame": "",
    "load_sweep": "folder",
    "gather_sweep": "folder",
    "load_examples": "path columns",
    "plan_memory": ("model tokens batch_size accumulate n_examples dtype site layers tp fsdp memory_gb cache_bytes"),
    "save_examples": "path examples",
    "mean_vector": "vectors",
    "mean_activations": "model tokenizer texts site layers skip batch_size max_tokens progress paths",
    "decode_latent": "model tokenizer vector max_new_tokens start strength",
    "plots.heatmap": "intervention path tokens title limit dpi",
    "plots.attribution": "result path title limit dpi",
    "plots.history": "result path title dpi",
    "plots.pareto": "result path by title dpi ax",
    "plots.path": "curves path kl log xlabel title dpi",
    "plots.strengths": "curves path ylabel xlabel log baseline title dpi ax",
    "plots.comparison": "rows path log title dpi",
    "plots.overlap": "matrix labels path title quantity dpi",
    "ActScaleModel.from_pretrained": "model folder is_trainable revision",
    "ActScaleModel.save_pretrained": "folder",
    "ActScaleModel.print_trainable_parameters": "",
    "ActScaleModel.push_to_hub": "repo_id private token",
    "ActScaleConfig": "kind site layers positions generated strength projection layers_path mlp",
}


@pytest.mark.parametrize("module", NAMES)
def test_no_public_name_is_lost(module: str) -> None:
    found = importlib.import_module(module)
    names = NAMES[module].split()
    assert sorted(found.__all__) == sorted(names)
    assert [name for name in names if not hasattr(found, name)] == []


def test_the_package_lists_its_names_once_for_programs_and_once_for_type_checkers() -> None:
    source = inspect.getsource(af)
    listed = source[source.index("if TYPE_CHECKING:") : source.index("_HOMES")]
    for name in set(af.__all__):
        assert f"{name} as {name}" in listed, name


@pytest.mark.parametrize("name", INTEGRATIONS)
def test_no_name_of_an_integration_is_lost(name: str) -> None:
    library, names = INTEGRATIONS[name]
    if library:
        pytest.importorskip(library)
    found = importlib.import_module(f"actscale_fast.integrations.{name}")
    assert [one for one in names.split() if not hasattr(found, one)] == []


def test_every_integration_is_listed() -> None:
    import pkgutil

    import actscale_fast.integrations

    found = {module.name for module in pkgutil.iter_modules(actscale_fast.integrations.__path__)}
    assert {name for name in found if not name.startswith("_")} == set(INTEGRATIONS)


def parameters_of(function: Any) -> list[str]:
    """The names of a function's parameters; keywords that a TypedDict describes are among them."""
    names = []
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            keywords = re.fullmatch(r"Unpack\[(\w+)\]", str(parameter.annotation))
            names += list(typing.get_type_hints(function.__globals__[keywords[1]])) if keywords else []
        elif name != "self":
            names.append(name)
    return names


@pytest.mark.parametrize("name", PARAMETERS)
def test_no_parameter_is_lost(name: str) -> None:
    function: Any = af
    for part in name.split("."):
        function = getattr(function, part)
    wanted = PARAMETERS[name].split()
    assert [one for one in wanted if one not in parameters_of(function)] == []
