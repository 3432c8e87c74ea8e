"""An address where no Ray head is: a line and exit 7 within seconds, before Ray is so much as imported."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest

from jobs.cluster.start import knock, refused, started
from jobs.stack.processes import free_ports
from pipeline.config import ClusterConfig
from pipeline.errors import ConfigError, RemoteError


@contextmanager
def listener(serve: Callable[[socket.socket], object]) -> Iterator[str]:
    """The address of a server that does this with the first who calls."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            connection, _ = server.accept()
            with connection, suppress(ConnectionError):
                serve(connection)
                while connection.recv(1000):
                    pass  # until the caller has gone

        thread = threading.Thread(target=accept)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        thread.join()


def test_nobody_listens() -> None:
    address = f"127.0.0.1:{free_ports(1)[0]}"
    for named in (address, f"ray://{address}"):
        told = pytest.raises(RemoteError, match=rf"^{named}: no Ray head answers \(.*refused\); start the cluster")
        with told, started(ClusterConfig(workers=1, address=named)):
            raise AssertionError("connected")


def test_who_listens_says_nothing() -> None:
    with listener(lambda _: None) as address, pytest.raises(RemoteError, match=r"no Ray head answers \(timed out\)"):
        knock(address, 0.5)


def test_who_listens_speaks_something_else() -> None:
    def refuse(connection: socket.socket) -> None:
        connection.recv(1000)
        connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    with listener(refuse) as address, pytest.raises(RemoteError, match=f"{address}: what answers is no Ray head; "):
        knock(address)


@pytest.mark.parametrize("address", ["head", "head:port", "head:99999", ":6379"])
def test_an_address_that_is_none(address: str) -> None:
    with pytest.raises(ConfigError, match=f"^{address}: not the address of a Ray head; HOST:PORT, or auto$"):
        knock(address)


def test_only_a_refusal_says_that_a_head_is_gone() -> None:
    assert refused(f"127.0.0.1:{free_ports(1)[0]}")
    with listener(lambda _: None) as address:
        assert not refused(address), "it answers"
    with socket.create_server(("127.0.0.1", 0), backlog=0) as busy, socket.create_connection(busy.getsockname()):
        assert not refused(f"127.0.0.1:{busy.getsockname()[1]}", 0.3), "nobody is let in, but somebody listens"
