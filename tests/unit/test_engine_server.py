"""What a closed door in front of the engine means: it is about us, so no line may be charged for it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from vllm_batch_dagster.adapters.engine.client import EngineClient
from vllm_batch_dagster.adapters.engine.server import Pace, Server
from vllm_batch_dagster.core.errors import EngineUnavailable
from vllm_batch_dagster.core.ports import EngineRequest


@asynccontextmanager
async def server_that_answers(status: int) -> AsyncIterator[Server]:
    async def answer(_request: web.Request) -> web.Response:
        return web.Response(status=status, text="{}")

    app = web.Application()
    app.router.add_post("/v1/embeddings", answer)
    async with TestServer(app) as listener:
        server = Server(EngineClient(str(listener.make_url("")).rstrip("/")), Pace(), lambda: None)
        server.open()
        try:
            yield server
        finally:
            await server.close()


@pytest.mark.parametrize("status", [301, 302, 401, 403])
async def test_a_refused_key_or_a_login_page_leaves_the_server_out(status: int) -> None:
    async with server_that_answers(status) as server:
        with pytest.raises(EngineUnavailable, match="check ENGINE_URL and ENGINE_API_KEY"):
            await server.send(EngineRequest("/v1/embeddings", b"{}", "line-1"))
        assert server.down is not None


@pytest.mark.parametrize("status", [200, 400, 404, 429])
async def test_what_is_about_the_line_is_an_answer(status: int) -> None:
    async with server_that_answers(status) as server:
        assert (await server.send(EngineRequest("/v1/embeddings", b"{}", "line-1"))).status == status
        assert server.down is None
