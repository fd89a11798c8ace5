"""A local HTTP server that answers by a script: what endpoints and upstreams do, in the order of the requests."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Step:
    """One answer.

    Attributes:
        status: HTTP status.
        body: What is sent.
        headers: More headers.
        delay: Seconds before anything is sent.
        parts: Sent one by one instead of the body, each after `pause` seconds; no length is announced.
        pause: Seconds before each part.
        cut: Break the connection after the parts.
    """

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    delay: float = 0.0
    parts: tuple[bytes, ...] = ()
    pause: float = 0.0
    cut: bool = False


def chat(text: str) -> Step:
    """Return a chat completion that says `text`."""
    return Step(body=json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode())


@dataclass
class Seen:
    """A request as it arrived."""

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def content(self) -> Any:
        return json.loads(self.body)


@dataclass
class Scripted:
    """The server.

    Attributes:
        url: Its base URL.
        steps: Answers to come; the last one is given again and again.
        seen: Requests so far.
        gone: Set once a client has gone while it was being answered.
    """

    url: str
    steps: list[Step]
    seen: list[Seen] = field(default_factory=list)
    gone: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def next(self, seen: Seen) -> Step:
        with self.lock:
            self.seen.append(seen)
            return self.steps.pop(0) if len(self.steps) > 1 else self.steps[0]


@contextmanager
def scripted(*steps: Step) -> Iterator[Scripted]:
    """Run a server that gives these answers, at the path /v1."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            step = found.next(Seen(self.path, {k.lower(): v for k, v in self.headers.items()}, body))
            time.sleep(step.delay)
            try:
                self.answer(step)
            except OSError:
                found.gone.set()

        do_GET = do_POST

        def answer(self, step: Step) -> None:
            self.send_response(step.status)
            headers = {"content-type": "application/json", **step.headers}
            if step.parts:
                headers["connection"] = "close"
            else:
                headers["content-length"] = str(len(step.body))
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            for part in step.parts or (step.body,):
                time.sleep(step.pause if step.parts else 0)
                self.wfile.write(part)
                self.wfile.flush()
            if step.parts:
                self.close_connection = True
            if step.cut:
                self.connection.close()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            found.gone.set()

    server = Server(("127.0.0.1", 0), Handler)
    found = Scripted(f"http://127.0.0.1:{server.server_address[1]}/v1", list(steps))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield found
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def nowhere() -> str:
    """Return a base URL where nothing listens."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}/v1"
