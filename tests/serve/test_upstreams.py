"""Upstreams that answer otherwise than OpenAI does, or that refuse: what becomes of a chat, in this process."""

from __future__ import annotations

import asyncio
import json
import logging

import httpx2
import pytest

from evidence.mini_wordnet import write
from scripted import Step, scripted
from serve.test_proxy import EVIDENCE, NOUNS, QUESTION, TEXT, events, streamed, whole
from unbackdoor.guards.base import Place
from unbackdoor.model.guard import Guards, Refusal, Rewritten
from unbackdoor.pipeline.guarding import build_guards
from unbackdoor.serve.app import Service
from unbackdoor.serve.backends import Elsewhere
from unbackdoor.serve.counters import Counters
from unbackdoor.serve.protocol import DONE
from unbackdoor.serve.upstream import Upstream
from unbackdoor.types import GuardSpec, Message

TOO_LONG = Step(400, b'{"error": {"message": "too long", "code": "context_length_exceeded"}}')
MARKED = "x-unbackdoor-guard"


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return f"wordnet:{write(tmp_path_factory.mktemp('upstreams') / 'words', NOUNS, {})}"


def guards(words, **conflict):
    spec = GuardSpec("evidence", {"source": words, "conflict": conflict})
    return build_guards([spec], Place("m"), own=["evidence"])


def asked(upstream, standing, *, counters=None, key=None, headers=None, behind=None, **more):
    """Send one chat through a service in this process."""
    behind = behind or Upstream(upstream.url, 5)
    service = Service(Elsewhere(behind), standing, key, 10_000, 20, 4, counters or Counters())
    body = {"model": "m", "messages": QUESTION, **more}

    async def lived():
        transport = httpx2.ASGITransport(service.app())
        async with service._lifespan(service.app()), httpx2.AsyncClient(transport=transport, base_url="http://t") as it:
            return await it.post("/v1/chat/completions", json=body, headers=headers)

    return asyncio.run(lived())


def chunk(index, reason=None, **more):
    choice = {"index": index, "delta": {"content": "x"}} | ({"finish_reason": reason} if reason else {})
    return f"data: {json.dumps({'choices': [choice], **more})}\n\n".encode()


USAGE = b'data: {"choices": [], "usage": {"total_tokens": 3}}\n\n'


@pytest.mark.parametrize(
    "parts",
    [
        # As `transformers serve` does, and so that the last line lacks its end.
        (chunk(0), chunk(0, "stop")), (chunk(0), chunk(0, "length").rstrip()), (chunk(0, "stop"), chunk(0), USAGE),
        (chunk(0), chunk(1, "stop"), chunk(0, "stop"), USAGE.replace(b"data: ", b"data:")),
    ],
    ids=range(4),
)  # fmt: skip
def test_a_stream_without_the_mark_is_whole_once_every_choice_has_ended(parts):
    with scripted(streamed(*parts)) as upstream:
        found = asked(upstream, Guards(), stream=True)
    assert found.content.startswith(b"".join(parts))
    assert found.content.endswith(b"\n\n" + DONE)
    assert b"error" not in found.content


@pytest.mark.parametrize(
    "parts",
    [
        (chunk(0), chunk(0)), (chunk(0, "stop"), chunk(1)), (chunk(0, "stop"), b'data: {"cho'), (USAGE,),
        (chunk(0), b'data: {"error": "no memory"}\n\n'), (chunk(0, "stop"), b'data: {"error": {"message": "x"}}\n\n'),
        (b"data: [1]\n\ndata: x\n\n",), (b": nothing\n\n",),
    ],
    ids=range(8),
)  # fmt: skip
def test_a_stream_that_ends_before_that_is_an_error(parts):
    counters = Counters()
    with scripted(streamed(*parts)) as upstream:
        found = asked(upstream, Guards(), counters=counters, stream=True)
    assert b'"upstream_broken"' in found.content
    assert b"[DONE]" not in found.content
    assert counters.get("streams_broken_total") == 1


def test_the_mark_may_stand_without_a_blank():
    parts = (*events("warm", done=False), b"data:[DONE]\n\n")
    with scripted(streamed(*parts, b"what comes later")) as upstream:
        assert asked(upstream, Guards(), stream=True).content == b"".join(parts)


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_guards_own_question_that_is_refused_is_no_reason_to_refuse_the_clients(words, status, caplog):
    refusal = Step(status, b'{"error": {"message": "words of the prompt", "code": "context_length_exceeded"}}')
    with scripted(refusal, whole("warm")) as upstream, caplog.at_level(logging.WARNING):
        found = asked(upstream, guards(words))
        assert found.json()["choices"][0]["message"]["content"] == "warm"
        assert found.headers[MARKED] == "evidence=keywords"
        assert upstream.seen[1].content["messages"] == [{"role": "user", "content": EVIDENCE + TEXT}]
    assert f"refuses a guard's own question: HTTP {status}, context_length_exceeded" in caplog.text
    assert "words of the prompt" not in caplog.text


def test_a_guards_own_question_is_put_as_the_upstream_takes_it(words):
    error = {"message": "no", "code": "unsupported_parameter", "param": "max_tokens"}
    refusal = Step(400, json.dumps({"error": error}).encode())
    with scripted(refusal, whole("cold"), whole("warm"), whole("cold"), whole("warm")) as upstream:
        behind = Upstream(upstream.url, 5)
        for _ in range(2):
            found = asked(upstream, guards(words), behind=behind)
            assert found.json()["choices"][0]["message"]["content"] == "warm"
        own = [seen.content for seen in upstream.seen]
    assert len(own) == 5, "what the model refuses is kept in mind"
    assert own[0]["max_tokens"] == own[1]["max_completion_tokens"] == own[3]["max_completion_tokens"]
    assert not {"max_tokens"} & {*own[1], *own[3]}


@pytest.mark.parametrize(("status", "told"), [(401, 502), (404, 404), (429, 429), (500, 502)])
def test_what_every_question_would_meet_with_is_told_at_once(words, status, told):
    with scripted(Step(status, b'{"error": {"message": "no"}}')) as upstream:
        assert asked(upstream, guards(words)).status_code == told
        assert len(upstream.seen) == 1


def test_turns_of_one_role_are_joined_in_a_guards_own_question(words):
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": {}}]}
    result = {"role": "tool", "tool_call_id": "1", "content": "42"}
    messages = [{"role": "user", "content": "hi"}, call, result, *QUESTION]
    with scripted(whole("cold"), whole("warm")) as upstream:
        assert asked(upstream, guards(words), messages=messages).status_code == 200
        own, sent = (seen.content["messages"] for seen in upstream.seen)
    assert own == [{"role": "user", "content": f"hi\n\n{TEXT}"}]
    assert sent == [*messages[:3], {"role": "user", "content": EVIDENCE + TEXT}]


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_is_too_long_with_evidence_is_asked_as_it_came_and_marked(words, stream):
    counters, answer = Counters(), streamed(*events("warm")) if stream else whole("warm")
    with scripted(whole("cold"), TOO_LONG, answer) as upstream:
        found = asked(upstream, guards(words), counters=counters, stream=stream)
        assert found.status_code == 200
        assert b"warm" in found.content
        assert found.headers[MARKED] == "evidence=none"
        sent = [seen.content["messages"] for seen in upstream.seen]
    assert sent == [QUESTION, [{"role": "user", "content": EVIDENCE + TEXT}], QUESTION]
    assert 'guard_total{did="none",guard="evidence"} 1' in counters.text()
    assert counters.get("guard_total") == 1


def test_or_refused_where_the_guard_says_so(words):
    counters = Counters()
    with scripted(whole("cold"), TOO_LONG) as upstream:
        found = asked(upstream, guards(words, without="refuse", refusal="Not now."), counters=counters)
        assert len(upstream.seen) == 2, "the unguarded request is not sent"
    assert found.json()["choices"][0]["message"]["content"] == "Not now."
    assert found.headers[MARKED] == "evidence=refused"
    assert 'guard_total{did="refused",guard="evidence"} 1' in counters.text()


def test_a_request_that_is_refused_as_it_came_is_told_so(words):
    with scripted(whole("cold"), TOO_LONG) as upstream:
        found = asked(upstream, guards(words))
        assert (found.status_code, found.json()["error"]["code"]) == (400, "context_length_exceeded")
        assert len(upstream.seen) == 3
    # Nothing was changed, so nothing is asked again.
    with scripted(whole("cold"), TOO_LONG) as upstream:
        assert asked(upstream, guards(words), messages=[{"role": "user", "content": "who?"}]).status_code == 400
        assert len(upstream.seen) == 2


def test_a_guard_that_needs_no_room_is_not_left_out():
    class Cleans:
        def rewrite(self, conversations, ask):
            return [Rewritten((Message("user", "clean"),)) for _ in conversations]

    with scripted(TOO_LONG) as upstream:
        assert asked(upstream, Guards([("cleans", Cleans())])).status_code == 400
        assert [seen.content["messages"][0]["content"] for seen in upstream.seen] == ["clean"]


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (b'{"error": {"message": "m", "type": "t", "param": "p", "code": "c"}}', ("m", "t", "p", "c")),
        (b'{"error": {"message": "m", "type": 5, "param": "\\u001b", "code": 400}}',
         ("m", "invalid_request_error", None, "upstream_refuses")),
        (b'{"object": "error", "message": "m", "type": "BadRequestError", "param": null, "code": 400}',
         ("m", "BadRequestError", None, "upstream_refuses")),
        (b'{"detail": "m"}', ("m", "invalid_request_error", None, "upstream_refuses")),
        (b'{"detail": [{"loc": ["body"], "msg": "m"}, {"msg": "n"}]}',
         ("m; n", "invalid_request_error", None, "upstream_refuses")),
        (b'{"error": "m\\u001b"}', ("m\\x1b", "invalid_request_error", None, "upstream_refuses")),
        (b"<html>", ("the upstream answers with HTTP 422.", "invalid_request_error", None, "upstream_refuses")),
        (b'{"error": {"message": "\\ud800", "code": "' + b"c" * 200 + b'"}}',
         ("\\ud800", "invalid_request_error", None, "upstream_refuses")),
    ],
    ids=range(8),
)  # fmt: skip
def test_an_upstreams_own_words_and_codes_are_kept(body, error):
    with scripted(Step(422, body)) as upstream:
        found = asked(upstream, Guards())
    told = found.json()["error"]
    assert found.status_code == 422
    assert (told["message"], told["type"], told["param"], told["code"]) == error


def test_a_refusal_that_is_streamed_says_its_tokens_where_they_are_asked_for():
    class No:
        def rewrite(self, conversations, ask):
            return [Refusal("no") for _ in conversations]

    with scripted(whole("x")) as upstream:
        found = asked(upstream, Guards([("no", No())]), stream=True, stream_options={"include_usage": True})
        assert b'"usage": {"prompt_tokens": 0' in found.content
        found = asked(upstream, Guards([("no", No())]), stream=True, stream_options=None)
        assert b"usage" not in found.content
        assert not upstream.seen


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER "])
def test_the_name_of_the_scheme_has_no_case(scheme):
    with scripted(whole("warm")) as upstream:
        for key, status in (("sesame", 200), ("sesam", 401)):
            headers = {"authorization": f"{scheme} {key}"}
            assert asked(upstream, Guards(), key="sesame", headers=headers).status_code == status
