"""Ports: what is free, who has it, and the sentence about it."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_batch_dagster.cli.addresses import (
    Address,
    describe_conflict,
    is_free,
    listening_addresses,
    port_owner,
)
from vllm_batch_dagster.settings import Settings, local_url


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A server that would share its port, as gRPC's do."""
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server


def port_of(server: socket.socket) -> int:
    port: int = server.getsockname()[1]
    return port


def test_a_shared_port_is_taken(listener: socket.socket) -> None:
    assert not is_free("127.0.0.1", port_of(listener))
    assert not is_free("0.0.0.0", port_of(listener))


def test_a_port_is_free_again_after_its_server(listener: socket.socket) -> None:
    port = port_of(listener)
    with socket.create_connection(("127.0.0.1", port)):
        listener.accept()[0].close()
    listener.close()
    assert is_free("127.0.0.1", port)


def test_an_address_of_another_machine_is_not_free() -> None:
    assert not is_free("192.0.2.1", 8080)


def test_the_conflict_names_port_setting_and_process(listener: socket.socket) -> None:
    port = port_of(listener)
    assert f"pid {os.getpid()}" in port_owner(port)
    fault, mend = describe_conflict(Address("web", "127.0.0.1", port, "DAGSTER_PORT"))
    assert f"port {port}" in fault
    assert f"pid {os.getpid()}" in fault
    assert "DAGSTER_PORT" in mend


def test_a_free_port_has_no_owner(listener: socket.socket) -> None:
    port = port_of(listener)
    listener.close()
    assert port_owner(port) == ""


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:80"),
        ("0.0.0.0", "http://127.0.0.1:80"),
        ("::", "http://127.0.0.1:80"),
        ("::1", "http://[::1]:80"),
        ("box.local", "http://box.local:80"),
    ],
)
def test_local_url(host: str, url: str) -> None:
    assert local_url(host, 80) == url


def test_every_address_names_an_existing_setting(tmp_path: Path) -> None:
    addresses = listening_addresses(Settings(vllm_batch_home=tmp_path))
    assert {address.setting.lower() for address in addresses} <= set(Settings.model_fields)
    assert len({address.port for address in addresses}) == len(addresses)
