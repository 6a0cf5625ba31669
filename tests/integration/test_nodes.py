"""A worker and its node: restarts of the node, names in use, tokens, TLS."""

from __future__ import annotations

import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import anyio
import pytest
import trustme
from websockets.asyncio.client import connect
from websockets.asyncio.server import ServerConnection
from websockets.asyncio.server import serve as serve_websocket

from disco import Node, NodeSettings, serve
from shared.config import tokens
from shared.config.handlers import HandlerRef
from shared.config.load import Agent, WorkerSpec
from shared.config.nodes import NodeAddress
from shared.config.schema import ConnectionSection
from shared.config.tokens import Secret
from tests.cluster import agent, cluster, outlive, until
from tests.integration.wire import AGENT_REGISTERED, REGISTERED
from worker.dispatching.choose import create_dispatcher
from worker.dispatching.handler import load
from worker.memory.base import Memory
from worker.node.client import NodeClient

pytestmark = pytest.mark.anyio
SECRET = "0123456789abcdef0123456789abcdef"


async def test_worker_joins_a_restarted_node_at_its_next_attempt(
    tmp_path: Path, reserved_port: int
) -> None:
    counting = agent("count", [f"ws://127.0.0.1:{reserved_port}"])
    async with cluster(tmp_path, counting, connection="reconnect_interval_ms = 1000") as running:
        before = await running.wait_state("count_server", "backoff")
        assert not await running.ready()
        assert (await running.results("x"))["properties"]["count"] == 1
        for _ in range(2):
            async with serve(NodeSettings(port=reserved_port)):
                failed = (await running.row("count_server"))["connection_failures"]
                await running.wait_ready()
                # The report of a failure before the node was up may arrive later.
                assert (await running.row("count_server"))["connection_failures"] <= failed + 1
            await running.wait_state("count_server", "backoff")
            assert not await running.ready()
        after = await running.row("count_server")
        assert (after["pid"], after["restarts"]) == (before["pid"], 0)
        assert (await running.results("x"))["properties"]["count"] == 2, "the memory is unchanged"


async def test_worker_registers_when_its_name_becomes_free(tmp_path: Path, node: Node) -> None:
    async with connect(f"{node.url}/ws") as holder:
        await holder.send('{"action":"register","name":"count"}')
        await holder.send('{"action":"agent_hello","capabilities":[]}')
        await node.wait_for("count")
        async with cluster(tmp_path, agent("count", [node.url])) as running:

            async def refused() -> bool:
                return "name_taken" in (await running.row("count_server"))["reason"]

            await until(refused, "the worker reports that the name is in use")
            before = await running.row("count_server")
            assert not await running.ready()
            assert (await running.results("x"))["properties"]["count"] == 1
            # The worker logs a state after it has reported it.
            await until(lambda: running.events("backoff"), "the loss is logged")
            assert len(running.events("backoff")) == 1
            await holder.close()
            await running.wait_ready()
            after = await running.row("count_server")
            assert (after["pid"], after["restarts"]) == (before["pid"], 0)


async def test_pings_keep_an_idle_worker_registered(tmp_path: Path, anyio_backend: object) -> None:
    async with serve(NodeSettings(port=0, idle_timeout_ms=2000)) as strict:
        async with cluster(
            tmp_path,
            agent("count", [strict.url]),
            connection="reconnect_interval_ms = 50\nping_interval_ms = 500",
        ) as running:
            await running.wait_ready()
            await outlive(strict, "count", 4.5)  # two idle timeouts


@pytest.mark.message_text
async def test_token_is_read_again_on_every_connection_attempt(
    tmp_path: Path, anyio_backend: object
) -> None:
    file = tmp_path / "count.jwt"
    expired = tokens.mint(SECRET, "count", ttl_s=-10)
    other = tokens.mint(SECRET, "other", ttl_s=60)
    good = tokens.mint(SECRET, "count", ttl_s=60)
    file.write_text(expired)
    file.chmod(0o600)
    async with serve(NodeSettings(port=0, secret=Secret(SECRET))) as guarded:
        options = {"jwt_token_file": str(file)}
        async with cluster(tmp_path, agent("count", [guarded.url], **options)) as running:
            for token, reason in (
                (None, "refused the token (401)"),
                (other, "name_mismatch"),
                ("", "is empty"),
            ):
                if token is not None:
                    file.write_text(token)

                async def reported(reason: str = reason) -> bool:
                    return reason in (await running.row("count_server"))["reason"]

                await until(reported, reason)
            pid = await running.worker_pid("count_server")
            file.write_text(good)
            await running.wait_ready()
            assert await running.worker_pid("count_server") == pid
            shown = (
                running.log + str(await running.rows()) + (tmp_path / "em-runner.toml").read_text()
            )
            assert not any(token in shown for token in (expired, other, good))


@pytest.mark.parametrize("way", ["value", "file", "secret", "environment"])
async def test_token_of_every_source_works_and_is_never_shown(
    way: str, tmp_path: Path, anyio_backend: object
) -> None:
    import psutil

    token = tokens.mint(SECRET, "count", ttl_s=60)
    (tmp_path / "token").write_text(token)
    (tmp_path / "secret").write_text(SECRET)
    for name in ("token", "secret"):
        (tmp_path / name).chmod(0o600)
    options: dict[str, Any] = {
        "value": {"jwt_token": token},
        "file": {"jwt_token_file": "token"},
        "secret": {"jwt_secret_file": "secret"},
        "environment": {},
    }[way]
    environ = {"EM_FILTER_JWT_TOKEN": token} if way == "environment" else None
    async with (
        serve(NodeSettings(port=0, secret=Secret(SECRET))) as guarded,
        cluster(
            tmp_path,
            agent("count", [guarded.url], **options),
            runner='log_level = "debug"',
            environ=environ,
        ) as running,
    ):
        await running.wait_ready()
        titles = " ".join(
            " ".join(psutil.Process(pid).cmdline()) for pid in running.record_processes()
        )
        shown = running.log + str(await running.rows()) + titles
        assert token not in shown
        assert SECRET not in shown


async def _tls_node(websocket: ServerConnection) -> None:
    import json

    async for _ in websocket:
        await websocket.send(json.dumps(REGISTERED))
        await websocket.recv()
        await websocket.send(json.dumps(AGENT_REGISTERED))
        await websocket.wait_closed()


@asynccontextmanager
async def tls_node(certificate: trustme.LeafCert) -> AsyncIterator[int]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)
    async with serve_websocket(_tls_node, "127.0.0.1", 0, ssl=context) as server:
        yield server.sockets[0].getsockname()[1]


async def test_tls_node_with_a_valid_certificate_is_joined(
    tmp_path: Path, anyio_backend: object
) -> None:
    ca = trustme.CA()
    ca.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    async with tls_node(ca.issue_cert("localhost")) as port:
        async with cluster(
            tmp_path, agent("count", [f"wss://localhost:{port}"], tls_ca_file="ca.pem")
        ) as running:
            await running.wait_ready()


def _past(hours: int) -> datetime:
    return datetime.now(UTC) - timedelta(hours=hours)


@pytest.mark.message_text
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("unknown CA", "unknown CA"),
        ("wrong host", "certificate is not valid for 'localhost'; it is for another host"),
        ("expired", "certificate has expired; the node must renew it"),
        ("self-signed", "self-signed certificate"),
    ],
)
async def test_invalid_tls_node_is_refused_with_its_reason(
    kind: str, reason: str, tmp_path: Path, anyio_backend: object
) -> None:
    ca = trustme.CA()
    (trustme.CA() if kind == "unknown CA" else ca).cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    leaf = {
        "unknown CA": lambda: ca.issue_cert("localhost"),
        "wrong host": lambda: ca.issue_cert("elsewhere.example"),
        "expired": lambda: ca.issue_cert("localhost", not_before=_past(2), not_after=_past(1)),
        "self-signed": lambda: _self_signed(tmp_path),
    }[kind]()
    async with tls_node(leaf) as port:
        async with cluster(
            tmp_path, agent("count", [f"wss://localhost:{port}"], tls_ca_file="ca.pem")
        ) as running:
            row = await running.wait_state("count_server", "backoff")
            assert "the certificate of localhost" in row["reason"]
            assert reason in row["reason"]
            assert (await running.results("x"))["properties"]["count"] == 1, (
                "direct queries are answered without the node"
            )


def _self_signed(folder: Path) -> Any:
    """Return a self-signed certificate that no one trusts."""
    lone = trustme.CA()
    lone.private_key_pem.write_to_path(str(folder / "lone.key"))
    lone.cert_pem.write_to_path(str(folder / "lone.pem"))

    class Lone:
        def configure_cert(self, context: ssl.SSLContext) -> None:
            context.load_cert_chain(folder / "lone.pem", folder / "lone.key")

    return Lone()


@pytest.mark.parametrize("anyio_backend", [("asyncio", {"use_uvloop": False})])
async def test_wildcard_certificate_verifies(
    tmp_path: Path, anyio_backend: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In this process, and without uvloop, so that the test can give the name an address.
    real = socket.getaddrinfo
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda host, *rest, **more: real(
            "127.0.0.1" if "node" in str(host) else host, *rest, **more
        ),
    )
    ca = trustme.CA()
    ca.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    states: list[tuple[str, str]] = []
    async with tls_node(ca.issue_cert("*.disco.example")) as port:
        spec = WorkerSpec(
            name="w",
            agent=Agent(
                name="a",
                handler=HandlerRef("worker.echo", None, "handle", tmp_path),
                nodes=(),
                connection=ConnectionSection(tls_ca_file=tmp_path / "ca.pem"),
            ),
            node=NodeAddress("node.disco.example", port, True),
        )
        dispatcher = create_dispatcher(load(spec.agent.handler), Memory())
        connection = NodeClient(spec, (), dispatcher, lambda *state: states.append(state))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(connection.run)
            await until(
                lambda: states[-1:] == [("ready", None)] or "backoff" in dict(states),
                "the worker is ready or in backoff",
            )
            tasks.cancel_scope.cancel()
    assert states[-1] == ("ready", None), states
