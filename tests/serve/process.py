"""A real `unbackdoor serve` in a process of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from openai import OpenAI


@dataclass
class Server:
    """A server that runs."""

    process: subprocess.Popen[str]
    url: str
    errors: list[str]
    clients: list[OpenAI] = field(default_factory=list)

    def client(self, key: str = "none") -> OpenAI:
        """Return a client, which is closed with the server; a socket that is left open fails some later test."""
        self.clients.append(OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60))
        return self.clients[-1]

    def metrics(self) -> dict[str, float]:
        import httpx2

        text = httpx2.get(f"{self.url}/metrics").text
        return {
            name: float(value) for name, value in re.findall(r"^(\S+(?:\{.*\})?) (\S+)$", text, re.M) if name != "#"
        }

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(timeout=60)


@contextmanager
def serving(*arguments: str, environment: Mapping[str, str] | None = None) -> Iterator[Server]:
    """Start `unbackdoor serve ARGUMENTS --port 0`, wait until it listens, and end it."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("UNBACKDOOR_")}
    command = [sys.executable, "-m", "unbackdoor.cli.main", "serve", *arguments, "--port", "0"]
    process = subprocess.Popen(
        command, env={**own, **(environment or {})}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    errors: list[str] = []
    server: Server | None = None
    reader = threading.Thread(target=lambda: errors.extend(process.stderr or ()), daemon=True)
    reader.start()
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"http://\S+(?=/v1)", line)
        if found is None:
            process.wait(timeout=60)
            reader.join()
            raise AssertionError(f"{line}{''.join(errors)}")
        server = Server(process, found[0], errors)
        yield server
    finally:
        for client in server.clients if server else ():
            client.close()
        if process.poll() is None:
            process.terminate()
            process.wait(timeout=60)
        reader.join()
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()


def saved(lm, folder: Path) -> Path:
    """Write a model as a folder."""
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return folder
