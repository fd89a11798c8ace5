"""Start a server from its recipe, and stop it: on SIGTERM or ^C it takes no more requests and ends those it has."""

from __future__ import annotations

import itertools
import math
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from unbackdoor.errors import UserError
from unbackdoor.pipeline.recipe import Recipe
from unbackdoor.run import Progress, Run
from unbackdoor.types import GuardSpec

if TYPE_CHECKING:
    from unbackdoor.guards.base import Guard
    from unbackdoor.serve.app import Service

KEY = "UNBACKDOOR_SERVE_KEY"


class ServeRecipe(Recipe):
    """`unbackdoor serve`."""

    command: Literal["serve"] = "serve"
    model: str | None = Field(None, description="the model to serve; or upstream")
    upstream: str | None = Field(None, description="base URL of the server to stand before, such as http://HOST/v1")
    guards: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="guards beside those that the model carries: name -> settings"
    )
    evidence: str | None = Field(None, description="source of evidence for the guard evidence")
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 for a free one")
    name: str | None = Field(None, min_length=1, description="what the model is called; null: as its folder is")
    key_from: str = Field(KEY, min_length=1, description="environment variable that holds the key clients must give")
    most_bytes: int = Field(1_000_000, ge=100, description="longest body of a request")
    timeout: float = Field(120.0, gt=0, description="seconds for one request, guards and whole answer together")
    most_tokens: int = Field(512, ge=1, description="longest reply of a model here, in tokens")
    most_batch: int = Field(16, ge=1, description="questions that a model here answers at the same time")
    most_waiting: int = Field(128, ge=1, le=1024, description="chats at the same time; more are sent away with 503")
    grace: float = Field(30.0, ge=0, description="seconds that running answers have after SIGTERM or ^C")


_SHARES, _ROOM = 4, 64
"""Connections for each chat that may wait (its answer, a body that arrives, clients that keep one), and for others."""
_HERE = ("name", "template", "precision", "most_tokens", "most_batch")
"""Settings of a model in this process."""


def check(recipe: ServeRecipe) -> None:
    """Look whether a recipe makes a server, before anything is loaded.

    Raises:
        UserError: If it does not.
    """
    from unbackdoor.evidence.sources import check_source
    from unbackdoor.model.files import check_model
    from unbackdoor.pipeline.preflight import check_device
    from unbackdoor.serve.access import client_key, upstream_key

    missing = [name for name in ("starlette", "uvicorn", "httpx2") if find_spec(name) is None]
    if missing:
        raise UserError(f"`serve` needs the package {missing[0]}; pip install 'unbackdoor[serve]'.")
    if (recipe.model is None) == (recipe.upstream is None):
        raise UserError("`serve` needs a model or --upstream URL, and not both.")
    guards = _own_guards(recipe)
    if recipe.model is not None:
        check_model(recipe.model)
        check_device(recipe.device)
    client_key(recipe.key_from, named=recipe.key_from != KEY)
    if recipe.upstream is not None:
        upstream_key(recipe.upstream)
    idle = [name for name in _HERE if getattr(recipe, name) != ServeRecipe.model_fields[name].default]
    if recipe.upstream is not None and idle:
        raise UserError(f"{', '.join(idle)} say how a model in this process works, and do nothing before an upstream.")
    if recipe.upstream is not None and not guards:
        raise UserError("--upstream without a guard does nothing; give --guard, such as --guard evidence.")
    for name, guard in guards.items() if recipe.upstream is not None else ():
        if guard.acts_on == "decode":
            raise UserError(
                f"the guard {name} chooses tokens and needs the model in this process, so it cannot stand before an "
                "upstream; serve the model itself."
            )
    if recipe.evidence is not None:
        check_source(recipe.evidence)


def serve(recipe: ServeRecipe, progress: Progress, ready: Callable[[str], None]) -> None:
    """Run a server until SIGTERM or ^C.

    Args:
        recipe: What is served and how.
        progress: Told what the person should know.
        ready: Called with the server's URL once it listens.

    Raises:
        UserError: If it cannot be started.
    """
    check(recipe)
    with _listening(recipe) as listening, _service(recipe, progress) as service:
        _run(recipe, service, listening, ready)


def _own_guards(recipe: ServeRecipe) -> dict[str, Guard]:
    """Return the guards that the person set up, by name; `--evidence` is the source of the guard evidence."""
    from unbackdoor.pipeline.guarding import guard_called

    found = {}
    for name, settings in recipe.guards.items():
        given = dict(settings)
        if name == "evidence" and "source" not in given:
            if recipe.evidence is None:
                raise UserError(
                    "--guard evidence needs --evidence: an endpoint, a model or wordnet; `unbackdoor explain evidence` "
                    "says more."
                )
            given["source"] = recipe.evidence
        elif name == "evidence" and recipe.evidence not in (None, given["source"]):
            raise UserError("--evidence and guards.evidence.source name two sources of evidence; give one of them.")
        guard = guard_called(name, given)
        found[guard.name()] = guard
    return found


@contextmanager
def _listening(recipe: ServeRecipe) -> Iterator[socket.socket]:
    """Return a socket that listens; taken before the model is loaded, so that a port that is in use shows at once."""
    try:
        family = socket.getaddrinfo(recipe.host, recipe.port, type=socket.SOCK_STREAM)[0][0]
        found = socket.socket(family, socket.SOCK_STREAM)
    except (OSError, UnicodeError) as problem:
        raise UserError(f"there is no address '{recipe.host}' here; give another --host.") from problem
    with found:
        try:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind((recipe.host, recipe.port))
        except OSError as problem:
            raise UserError(
                f"cannot listen on {recipe.host} port {recipe.port} ({problem.strerror}); give another --port."
            ) from problem
        yield found


@contextmanager
def _service(recipe: ServeRecipe, progress: Progress) -> Iterator[Service]:
    """Return the server's parts; a model's thread has ended at the end."""
    from unbackdoor.serve.access import client_key
    from unbackdoor.serve.app import Service
    from unbackdoor.serve.counters import Counters

    key = client_key(recipe.key_from, named=recipe.key_from != KEY)
    if key is None and recipe.host not in {"127.0.0.1", "::1", "localhost"}:
        progress.notice(f"whoever can reach {recipe.host} can use this server; set {recipe.key_from} to ask for a key.")
    counters = Counters()
    limits = (key, recipe.most_bytes, recipe.timeout, recipe.most_waiting, counters)
    own = [GuardSpec(name, guard.settings()) for name, guard in _own_guards(recipe).items()]
    if recipe.upstream is not None:
        from unbackdoor.guards.base import Place
        from unbackdoor.model.builtin import cache_folder
        from unbackdoor.pipeline.guarding import build_guards
        from unbackdoor.serve.access import upstream_key
        from unbackdoor.serve.backends import Elsewhere
        from unbackdoor.serve.upstream import Upstream

        place = Place(recipe.upstream, device=recipe.device, cache=cache_folder(), notice=progress.notice, serving=True)
        guards = build_guards(own, place, source=recipe.evidence, own=[spec.name for spec in own])
        upstream = Upstream(recipe.upstream, recipe.timeout, upstream_key(recipe.upstream))
        yield Service(Elsewhere(upstream), guards, *limits)
        return
    from unbackdoor.model.guard import Guards
    from unbackdoor.serve.backends import Here
    from unbackdoor.serve.engine import Engine

    lm = _model(recipe, own, progress)
    guards = lm.guarding or Guards()
    engine = Engine(lm, most=recipe.most_batch, decode=guards.decode)
    numbers = itertools.count(1)
    seed = Run(recipe.seed)
    name = name_of(recipe)
    try:
        here = Here(engine, name, recipe.most_tokens, counters, lambda: seed.stream_seed(f"request {next(numbers)}"))
        yield Service(here, guards, *limits)
    finally:
        engine.stop()


def name_of(recipe: ServeRecipe) -> str:
    """Return what a model here is called: as its folder, also where that is written as `.`."""
    # Links are not followed, because a link's name is what the person calls it by.
    return recipe.name or Path(os.path.abspath(str(recipe.model))).name or "model"


def _model(recipe: ServeRecipe, own: list[GuardSpec], progress: Progress) -> Any:
    """Load the model with its own guards and the person's; of one name, the person's."""
    from unbackdoor.model.load import load
    from unbackdoor.pipeline.guarding import with_guards

    assert recipe.model is not None
    lm = load(recipe.model, device=recipe.device, dtype=recipe.precision, template=recipe.template, trainable=False)
    names = [spec.name for spec in own]
    lm = replace(lm, guards=(*(spec for spec in lm.guards if spec.name not in names), *own))
    if recipe.evidence is not None and not lm.guards:
        raise UserError(f"'{recipe.model}' carries no guard that would use --evidence; give --guard evidence, too.")
    notice, source = progress.notice, recipe.evidence
    return with_guards(lm, device=recipe.device, notice=notice, source=source, own=names, serving=True)


def _run(recipe: ServeRecipe, service: Service, listening: socket.socket, ready: Callable[[str], None]) -> None:
    import uvicorn

    from unbackdoor.serve.connections import impatient

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets=sockets)
            if self.started:
                host, port = listening.getsockname()[:2]
                ready(f"http://{f'[{host}]' if ':' in host else host}:{port}")

    config = uvicorn.Config(
        service.app(), http=impatient(recipe.timeout), ws="none", log_config=None, access_log=False, lifespan="on",
        server_header=False, timeout_graceful_shutdown=math.ceil(recipe.grace), timeout_keep_alive=15,
        limit_concurrency=_SHARES * recipe.most_waiting + _ROOM,
    )  # fmt: skip
    server = Server(config)
    try:
        server.run(sockets=[listening])
    except KeyboardInterrupt:
        # uvicorn hands the signal on once it has stopped; the caller's handler makes this of it.
        if not server.should_exit:
            raise


def settings_of(values: Mapping[str, Any], guards: list[str]) -> dict[str, Any]:
    """Return a recipe's fields with the guards that were named on the command line added."""
    named: dict[str, dict[str, Any]] = {name.replace("-", "_").lower(): {} for name in guards}
    return {**values, "guards": {**named, **(values.get("guards") or {})}}
