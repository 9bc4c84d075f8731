"""Puts the table on a worker's model once it is loaded, before vLLM profiles, compiles or captures anything."""

from __future__ import annotations

import functools
import logging
from typing import Any

from ..._version import __version__
from .._token_rows import rank_heads
from . import compatibility, configuration, runner_v1, runner_v2
from .served_model import ServedModel
from .settings import Settings
from .sites import attention_sites
from .steered_attention import attach
from .worker_table import WorkerTable


def install() -> None:
    """Wrap the start of vLLM's workers in this process."""
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    init = WorkerWrapperBase.init_device

    @functools.wraps(init)
    def init_device(self: Any) -> Any:
        follow(self.worker, self.vllm_config)
        return init(self)

    WorkerWrapperBase.init_device = init_device


def follow(worker: Any, vllm_config: Any) -> None:
    """Let a worker steer its model from when it has loaded it.

    Raises:
        RuntimeError: the engine's configuration does not say what is served.
    """
    served = ServedModel.of_config(vllm_config)
    if served is None and Settings.from_environment() is None:
        return  # an engine without interventions, in a process that had another one
    if served is None:
        raise RuntimeError(
            "actscale_fast: ACTSCALE_INTERVENTIONS is set, but the engine's configuration was not made by vLLM's "
            "EngineArgs, so that requests cannot be steered"
        )
    if served.sources != configuration.sources():
        raise RuntimeError("actscale_fast: this worker has another version of the plug-in than the server")
    load = worker.load_model

    @functools.wraps(load)
    def load_model(*args: Any, **kwargs: Any) -> Any:
        loaded = load(*args, **kwargs)
        table = steer(worker, vllm_config, served)
        worker.actscale_status = table.status
        return loaded

    worker.load_model = load_model


def steer(worker: Any, vllm_config: Any, served: ServedModel) -> WorkerTable:
    """Attach a new table to the model that a worker has loaded.

    Raises:
        ValueError: the model's attention is not what the plug-in can steer, with the reason.
        ImportError: a build of vLLM that the plug-in does not know.
    """
    from vllm.config import set_current_vllm_config
    from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

    compatibility.require_signatures(compatibility.ATTENTION)
    runner = worker.model_runner
    rank, size = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    dtype = vllm_config.model_config.dtype
    with set_current_vllm_config(vllm_config):
        sites = attention_sites(runner.get_model(), served, rank=rank, size=size, dtype=dtype)
    scheduler, compilation = vllm_config.scheduler_config, vllm_config.compilation_config
    table = WorkerTable(
        served,
        rank_heads(served.n_heads, rank, size),
        max_requests=scheduler.max_num_seqs,
        max_tokens=max(scheduler.max_num_batched_tokens, *(compilation.cudagraph_capture_sizes or [0])),
        device=runner.device,
    )
    for site in sites:
        attach(site.attention, table.layer(site.layer))
        if (output := table.output_layer(site.layer)) is not None:
            attach(site.projection, output)
    if vllm_config.use_v2_model_runner:
        runner_v2.attach(runner, table)
    else:
        runner_v1.attach(runner, table)
    _announce(table, vllm_config, rank, size)
    return table


def _announce(table: WorkerTable, vllm_config: Any, rank: int, size: int) -> None:
    import torch
    import vllm

    found, runner = table.status(), "V2" if vllm_config.use_v2_model_runner else "V1"
    first, after = found["heads"]
    # A logger of vLLM's, because the root logger of a server is often silent.
    logging.getLogger("vllm.actscale_fast").info(
        f"actscale-fast {__version__} on vLLM {vllm.__version__} ({runner} model runner) and PyTorch "
        f"{torch.__version__}: {', '.join(found['kinds'])} in {found['layers']} layers, heads {first} to {after - 1} "
        f"of {table.served.n_heads} (rank {rank} of {size}); {found['rows']} rows for "
        f"{vllm_config.scheduler_config.max_num_seqs} requests and {found['tokens']} tokens, "
        f"{found['bytes'] / 2**20:.1f} MiB"
    )
