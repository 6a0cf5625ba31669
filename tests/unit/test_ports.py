"""Ports that tests hold for servers that come later."""

from __future__ import annotations

import socket

import pytest

from shared.http_server import listen, resolve
from tests.ports import HOST, held_ports


def test_server_may_listen_again_and_again_where_nobody_else_may_bind() -> None:
    with held_ports(2) as ports:
        assert ports[1] == ports[0] + 1
        for port in ports:
            for _ in range(2):
                listen(resolve(HOST, port, hint=""), hint="").close()
                with socket.socket() as other, pytest.raises(OSError, match="in use"):
                    other.bind((HOST, port))
                with socket.socket() as caller:
                    assert caller.connect_ex((HOST, port)) != 0, "nobody listens"
