"""Clients that are silent: their connections are closed, and take no place from others."""

from __future__ import annotations

import asyncio
import socket
import time
from contextlib import ExitStack

import httpx2
import pytest
import uvicorn

from evidence.mini_wordnet import write
from scripted import nowhere
from serve.process import serving
from unbackdoor.serve.connections import LONGEST, impatient

HALF = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"
SECONDS = 2


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    words = f"wordnet:{write(tmp_path_factory.mktemp('limits') / 'words')}"
    limits = ("--set", f"timeout={SECONDS}", "--set", "most_waiting=1")
    with serving("--upstream", nowhere(), "--guard", "evidence", "--evidence", words, *limits) as found:
        yield found


def connect(server):
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=15)


def closed_after(connection, drip=b""):
    """Return the seconds until a connection is closed, bytes sent meanwhile."""
    started = time.monotonic()
    connection.settimeout(0.3)
    while time.monotonic() - started < 15:
        try:
            if drip:
                connection.sendall(drip)
            if not connection.recv(1000):
                break
        except TimeoutError:
            continue
        except OSError:
            break
    return time.monotonic() - started


def test_half_a_header_and_silence_is_closed(server):
    with connect(server) as nothing, connect(server) as half:
        half.sendall(HALF)
        assert SECONDS - 1 < closed_after(half) < 8
        assert closed_after(nothing) < 8


def test_bytes_that_never_end_a_header_are_no_sign_of_life(server):
    with connect(server) as connection:
        connection.sendall(HALF)
        assert closed_after(connection, drip=b"a: b\r\n") < 8


def test_half_a_header_after_a_whole_request_is_closed(server):
    with connect(server) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"200" in connection.recv(1000)
        time.sleep(0.7)
        connection.sendall(HALF)
        assert closed_after(connection, drip=b"a: b\r\n") < 8


def test_silent_connections_take_a_place_for_a_short_time_only(server):
    with ExitStack() as stack:
        for _ in range(4 + 64):
            stack.enter_context(connect(server))
        assert httpx2.get(f"{server.url}/health").status_code == 503
        until = time.monotonic() + 15
        while time.monotonic() < until:
            if httpx2.get(f"{server.url}/health").status_code == 200:
                return
            time.sleep(0.2)
        pytest.fail("silence keeps others out")


def test_bodies_that_do_not_arrive_are_counted_and_the_server_still_tells_how_it_is(server):
    with connect(server) as first:
        first.sendall(HALF + b"Content-Length: 100\r\n\r\n{")
        time.sleep(0.3)
        chat = httpx2.post(f"{server.url}/v1/chat/completions", json={"model": "m", "messages": []})
        assert (chat.status_code, chat.json()["error"]["code"]) == (503, "overloaded")
        for path in ("/health", "/metrics"):
            assert httpx2.get(f"{server.url}{path}").status_code == 200
        assert b"408" in first.recv(1000)
    assert httpx2.post(f"{server.url}/v1/chat/completions", json={"model": "m", "messages": []}).status_code == 400


def test_a_connection_whose_end_is_not_read_is_dropped():
    class Transport:
        closing = aborted = False

        def get_extra_info(self, name):
            return None

        def is_closing(self):
            return self.closing

        def close(self):
            self.closing = True

        def abort(self):
            self.aborted = True

    async def lived():
        made = impatient(0.6)(uvicorn.Config(lambda: None), uvicorn.server.ServerState(), {})
        transport = Transport()
        made.connection_made(transport)
        times = []
        for what in ("closing", "aborted"):
            while not getattr(transport, what):
                await asyncio.sleep(0.05)
            times.append(asyncio.get_running_loop().time())
        made.connection_lost(RuntimeError())
        return times[1] - times[0]

    assert asyncio.run(asyncio.wait_for(lived(), 20)) > 0.5
    assert impatient(1000).patience == LONGEST
