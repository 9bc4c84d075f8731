"""Routes of vLLM's API server that tell which interventions are served (entry point group `vllm.endpoint_plugins`).

vLLM loads them only where VLLM_PLUGINS names "actscale". They only read: interventions are added and removed in the
folder (`actscale-fast serving`), by whoever may write there. Below /v1, so that vLLM's --api-key guards them.

- GET /v1/actscale/interventions: all that can be named, those refused with the reason, and the state of the workers
- GET /v1/actscale/interventions/{name}: one of them; 404 if it is unknown, 400 with the reason if it is refused
"""

from __future__ import annotations

import asyncio
from argparse import Namespace
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, HTTPException, Request

from ..._log import logger
from .admission import registry_of
from .metrics import admitted, show_tables
from .misplaced_options import route_of
from .registry import Entry, Registry

if TYPE_CHECKING:
    from starlette.datastructures import State
    from starlette.types import ASGIApp, Receive, Scope, Send
    from vllm.engine.protocol import EngineClient

PATH = "/v1/actscale/interventions"
_PATIENCE = 2.0  # seconds that a reader of /metrics waits for the workers


class InterventionRoutes:
    """The endpoint plug-in: `attach_router` and `init_state` are called by vLLM's API server."""

    name = "actscale"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        app.add_api_route(PATH, all_interventions, methods=["GET"])
        app.add_api_route(PATH + "/{name}", one_intervention, methods=["GET"])
        app.add_middleware(_TablesInMetrics)

    async def init_state(self, engine_client: EngineClient | None, state: State, args: Namespace) -> None:
        """Nothing is kept: the routes ask the registry of the engine."""


async def all_interventions(request: Request) -> dict[str, Any]:
    """What requests can name now, with the number of requests that this API server process has steered by it."""
    engine = request.app.state.engine_client
    registry = _registry(engine)
    try:
        rows, refused = await asyncio.to_thread(_rows, registry)
    except (ValueError, OSError) as error:  # the folder itself cannot be read
        raise HTTPException(500, registry.public(error)) from None
    workers = await engine.collective_rpc("actscale_status")
    return {"object": "list", "data": rows, "refused": refused, "workers": workers}


async def one_intervention(name: str, request: Request) -> dict[str, Any]:
    """One intervention, as it is on disk now."""
    registry = _registry(request.app.state.engine_client)
    try:
        if name not in await asyncio.to_thread(registry.names):
            raise HTTPException(404, f"there is no intervention {name!r}")
        return _row(await asyncio.to_thread(registry.get, name))
    except (ValueError, OSError) as error:
        raise HTTPException(400, registry.public(error)) from None


def _registry(engine: EngineClient) -> Registry:
    try:
        return registry_of(engine)
    except ValueError as error:
        raise HTTPException(404, str(error)) from None


def _rows(registry: Registry) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """What is served, and why the rest is not."""
    rows, refused = [], {}
    for name in registry.names():
        try:
            rows.append(_row(registry.get(name)))
        except (ValueError, OSError) as error:
            refused[name] = registry.public(error)
    return rows, refused


def _row(entry: Entry) -> dict[str, Any]:
    parts = entry.intervention.singles
    return {
        "name": entry.name,
        "kind": " + ".join(entry.kinds),
        "layers": sorted({layer for part in parts for layer in part.location.layers}),
        "heads": sorted({part.location.model.n_heads for part in parts})[-1],
        "active": entry.intervention.n_active,
        "tokens": " + ".join(dict.fromkeys(part.location.tokens for part in parts)),
        "digest": entry.sha256,
        "requests": admitted[entry.name],
    }


class _TablesInMetrics:
    """Asks the workers for the state of their tables when /metrics is read."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and route_of(scope) == "/metrics":
            await _show_tables(scope["app"].state.engine_client)
        await self.app(scope, receive, send)


async def _show_tables(engine: EngineClient) -> None:
    try:
        registry_of(engine)
    except ValueError:  # nothing is served
        return
    try:
        show_tables(await asyncio.wait_for(engine.collective_rpc("actscale_status"), _PATIENCE))
    except Exception as error:  # the other metrics are shown whatever has become of the engine
        logger.warning("/metrics: the workers did not tell the state of their tables (%r)", error)
