"""What prompt guards ask an upstream themselves, as the same model that the client asks."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import wait
from dataclasses import dataclass
from typing import TYPE_CHECKING

from unbackdoor.evidence.refused import refused_field, without_refused
from unbackdoor.model.guard import Patience, Turns
from unbackdoor.serve.engine import Gone
from unbackdoor.serve.protocol import Problem
from unbackdoor.serve.turns import merged
from unbackdoor.serve.upstream import Refused, Upstream

if TYPE_CHECKING:
    import httpx2

_LOOK = 0.1
"""Seconds after which a guard's thread looks whether anybody waits for it still."""
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class AskUpstream:
    """`Ask` for prompt guards: their questions go to the upstream, as the same model.

    Attributes:
        upstream: Who is asked.
        client: The connections to it.
        loop: The event loop that they belong to.
        model: Name of the model, as the client gave it.
        patience: How long an answer is waited for.
    """

    upstream: Upstream
    client: httpx2.AsyncClient
    loop: asyncio.AbstractEventLoop
    model: str
    patience: Patience
    special: frozenset[str] = frozenset()

    def __call__(self, conversations: Sequence[Turns], max_new_tokens: int) -> list[str]:
        """Return a reply to each conversation; blocks, so it is called in another thread than the loop's.

        It is greedy, unless the model takes no temperature.

        A question of a guard's own that the upstream refuses, for example because it is too long for the model, is no
        reason to refuse the client's: the reply to it is "", and the guard does what it does where the model says
        nothing.

        Raises:
            Problem: If the upstream does not answer.
            Gone: If nobody waits any more.
        """
        return [self._said(turns, max_new_tokens) for turns in conversations]

    def _said(self, turns: Turns, max_new_tokens: int) -> str:
        messages = [{"role": turn.role, "content": turn.content} for turn in merged(turns)]
        asked = {"model": self.model, "messages": messages, "stream": False}
        wanted: dict[str, object] = {"max_tokens": max_new_tokens, "temperature": 0}
        while True:
            refused = {field for model, field in self.upstream.refused if model == self.model}
            try:
                return _text_of(self._whole({**asked, **without_refused(wanted, refused)}))
            except Refused as problem:
                if (field := refused_field(problem.code, problem.param)) and field not in refused:
                    self.upstream.refused.add((self.model, field))
                    continue
                # Not in its words: they may hold the prompt.
                told = (problem.status, problem.code)
                _LOG.warning("the upstream refuses a guard's own question: HTTP %d, %s", *told)
                return ""

    def _whole(self, content: Mapping[str, object]) -> bytes:
        """Return the upstream's answer, while somebody waits for it."""
        if not self.patience.left():
            raise Gone
        whole = asyncio.run_coroutine_threadsafe(self.upstream.whole(self.client, content), self.loop)
        while self.patience.left():
            if wait([whole], timeout=_LOOK).done:
                return whole.result()[1]
        # Wherever it is, it ends here: an upstream that sends a byte now and then would hold it for ever.
        whole.cancel()
        raise Gone

    def fits(self, turns: Turns, new_tokens: int | None = None) -> bool:
        """Return True: only the upstream knows."""
        del turns, new_tokens
        return True


def _text_of(body: bytes) -> str:
    try:
        text = json.loads(body)["choices"][0]["message"]["content"]
    except (LookupError, TypeError) as problem:
        raise Problem(502, "upstream_broken", "the upstream's answer is no chat completion.") from problem
    return text.strip() if isinstance(text, str) else ""
