"""`tests.ports`: ports that tests reserve for servers that start later."""

from __future__ import annotations

import socket

import pytest

from shared.http.server import Address
from tests.ports import HOST, reserved_ports


def test_server_can_listen_on_a_reserved_port_repeatedly() -> None:
    with reserved_ports(2) as ports:
        for port in ports:
            for _ in range(2):
                Address.resolve(HOST, port, hint="").listen().close()


def test_no_other_program_can_bind_a_reserved_port() -> None:
    with reserved_ports(2) as ports:
        for port in ports:
            with socket.socket() as other, pytest.raises(OSError, match="in use"):
                other.bind((HOST, port))


def test_reserved_port_refuses_connections_until_a_server_listens() -> None:
    with reserved_ports(2) as ports, socket.socket() as client:
        assert client.connect_ex((HOST, ports[0])) != 0


def test_reserved_ports_are_consecutive() -> None:
    with reserved_ports(2) as ports:
        assert ports[1] == ports[0] + 1
