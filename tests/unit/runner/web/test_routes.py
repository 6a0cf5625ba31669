"""`runner.web.routes`: the responses to requests that no route answers."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from runner.web.routes import Api
from shared.config.load import HttpAddress
from shared.http.errors import INTERNAL_ERROR_TEXT, ErrorCode

pytestmark = pytest.mark.anyio


class BrokenWorkers:
    @property
    def rows(self) -> Any:
        raise RuntimeError("a secret")


async def test_internal_error_of_a_route_has_the_same_body_as_others() -> None:
    router: Any = None
    workers: Any = BrokenWorkers()
    api = Api(router, {}, workers, HttpAddress("127.0.0.1", 9600))
    transport = httpx.ASGITransport(api.app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:9600") as client:
        response = await client.get("/workers")
    assert response.status_code == 500
    assert response.json() == {"error": INTERNAL_ERROR_TEXT, "code": ErrorCode.INTERNAL_ERROR}
