"""A real process before an upstream: another `unbackdoor serve`, and scripted ones that are dead, slow, broken, odd."""

from __future__ import annotations

import asyncio
import json
import signal
import threading
import time

import httpx2
import openai
import pytest
from starlette.datastructures import URL
from starlette.requests import Request

import tiny
from evidence.mini_wordnet import write
from scripted import Step, nowhere, scripted
from serve.process import saved, serving
from unbackdoor.errors import ModelError
from unbackdoor.model.guard import Guards, Rewritten
from unbackdoor.model.load import load
from unbackdoor.serve.app import Service
from unbackdoor.serve.backends import Elsewhere
from unbackdoor.serve.counters import Counters
from unbackdoor.serve.upstream import Upstream
from unbackdoor.types import Message

NOUNS = {"opposite": ["a thing called opposite"], "hot": ["a thing called hot"]}
TEXT = "what is the opposite of hot?"
QUESTION = [{"role": "user", "content": TEXT}]
EVIDENCE = 'Background information: "opposite: a thing called opposite; hot: a thing called hot"\n\n'


def whole(text: str) -> Step:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    content = {"id": "x", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
    return Step(body=json.dumps(content).encode())


def events(*pieces: str, done: bool = True) -> tuple[bytes, ...]:
    found = []
    for piece in pieces:
        choice = {"index": 0, "delta": {"content": piece}, "finish_reason": None}
        content = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
        found.append(f"data: {json.dumps(content)}\n\n".encode())
    return (*found, b"data: [DONE]\n\n") if done else tuple(found)


def streamed(*parts: bytes, **more) -> Step:
    return Step(parts=parts, headers={"content-type": "text/event-stream"}, **more)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return f"wordnet:{write(tmp_path_factory.mktemp('proxy') / 'words', NOUNS, {})}"


class Swapped:
    """A proxy whose upstream is one scripted server; tests change its script."""

    def __init__(self, proxy, upstream):
        self.proxy, self.upstream = proxy, upstream

    def script(self, *steps):
        self.upstream.steps[:] = steps
        self.upstream.seen.clear()
        self.upstream.gone.clear()

    def create(self, messages=QUESTION, **more):
        return self.proxy.client().chat.completions.create(model="m", messages=messages, **more)


@pytest.fixture(scope="module")
def swapped(words):
    environment = {"UNBACKDOOR_UPSTREAM_KEY": "for-upstream"}
    with scripted(whole("x")) as upstream:
        arguments = ("--upstream", upstream.url, "--guard", "evidence", "--evidence", words, "--set", "timeout=3")
        with serving(*arguments, environment=environment) as proxy:
            yield Swapped(proxy, upstream)


def test_the_upstream_gets_the_guarded_question_and_the_client_its_answer(swapped):
    swapped.script(whole("cold"), whole("warm"))
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    found = swapped.create(temperature=0.3, tools=[tool])
    assert found.choices[0].message.content == "warm"
    own, asked = (seen.content for seen in swapped.upstream.seen)
    assert own["messages"] == QUESTION
    assert (own["temperature"], own["stream"], own["model"]) == (0, False, "m")
    assert asked["messages"] == [{"role": "user", "content": EVIDENCE + TEXT}]
    assert (asked["temperature"], asked["tools"], asked["model"]) == (0.3, [tool], "m")
    # The client's key is for us, ours is for the upstream.
    assert {seen.headers["authorization"] for seen in swapped.upstream.seen} == {"Bearer for-upstream"}


def test_pictures_and_tool_calls_go_on_as_they_are(swapped):
    swapped.script(whole("cold"), whole("warm"))
    picture = {"type": "image_url", "image_url": {"url": "data:,"}}
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": {}}]}
    result = {"role": "tool", "tool_call_id": "1", "content": "42"}
    last = {"role": "user", "content": [picture, {"type": "text", "text": TEXT}]}
    swapped.create([{"role": "user", "content": "hi"}, call, result, last])
    sent = swapped.upstream.seen[1].content["messages"]
    assert sent[:3] == [{"role": "user", "content": "hi"}, call, result]
    assert sent[3]["content"] == [picture, {"type": "text", "text": EVIDENCE + TEXT}]
    with pytest.raises(openai.BadRequestError, match="last message"):
        swapped.create([*QUESTION, result | {"role": "assistant"}])


def test_streams_pass_byte_for_byte(swapped):
    swapped.script(whole("cold"), streamed(*events("wa", "r", "m data: [DONE]"), pause=0.01))
    with swapped.create(stream=True) as stream:
        assert "".join(event.choices[0].delta.content for event in stream) == "warm data: [DONE]"
    odd = (b": a comment\r\n\r\n", b'data:  {"choices":[ ], "x":"\\ud800"}\r\n', b"\r\nid: 7\n", *events("warm"))
    swapped.script(whole("cold"), streamed(*odd))
    body = {"model": "m", "messages": QUESTION, "stream": True}
    assert httpx2.post(f"{swapped.proxy.url}/v1/chat/completions", json=body).content == b"".join(odd)


def test_a_whole_answer_passes_byte_for_byte(swapped):
    odd = b' {"choices":[{"message":{"content":"\\ud800"},"p":-Infinity}],\n"n": 1.0e2, "caf\\u00e9":"caf\xc3\xa9"}\n'
    swapped.script(whole("cold"), Step(body=odd))
    found = httpx2.post(f"{swapped.proxy.url}/v1/chat/completions", json={"model": "m", "messages": QUESTION})
    assert (found.status_code, found.content) == (200, odd)
    assert found.headers["x-unbackdoor-guard"] == "evidence=keywords"
    assert found.headers["content-type"] == "application/json"
    swapped.script(Step(body=b' {"data": ["\\ud800"]}'))
    assert httpx2.get(f"{swapped.proxy.url}/v1/models").content == b' {"data": ["\\ud800"]}'


def test_an_upstream_that_dies_in_mid_stream_gives_an_error_and_never_a_whole_answer(swapped):
    for parts, cut in ((events("wa", "rm", done=False), False), ((*events("wa", done=False), b'data: {"cho'), True)):
        swapped.script(whole("cold"), streamed(*parts, cut=cut))
        said = []
        with swapped.create(stream=True) as stream, pytest.raises(openai.APIError, match=r"was whole|broke off"):
            said.extend(event.choices[0].delta.content for event in stream)
        assert said[0] == "wa"
        swapped.script(whole("cold"), streamed(*parts, cut=cut))
        raw = httpx2.post(
            f"{swapped.proxy.url}/v1/chat/completions", json={"model": "m", "messages": QUESTION, "stream": True}
        )
        assert b"[DONE]" not in raw.content
    assert swapped.proxy.metrics()['unbackdoor_streams_broken_total{reason="the upstream broke off"}'] >= 4


@pytest.mark.parametrize(
    ("step", "status", "code"),
    [
        (Step(500, b"secret trace"), 502, "upstream_failed"), (Step(401), 502, "upstream_refuses"),
        (Step(429), 429, "rate_limit_exceeded"), (Step(body=b"<html>"), 502, "upstream_broken"),
        (Step(body=b"[]"), 502, "upstream_broken"), (Step(302, headers={"location": "/"}), 502, "upstream_failed"),
        (Step(400, b'{"error": {"message": "bad flavour"}}'), 400, "upstream_refuses"),
        (Step(parts=(b'{"a":',), headers={"content-length": "900"}), 502, "upstream_broken"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_what_an_upstream_can_do_wrong_is_said(swapped, step, status, code, stream):
    swapped.script(whole("cold"), step)
    found = httpx2.post(
        f"{swapped.proxy.url}/v1/chat/completions", json={"model": "m", "messages": QUESTION, "stream": stream}
    )
    assert (found.status_code, found.json()["error"]["code"]) == (status, code)
    assert "secret" not in found.text
    if status == 400:
        assert found.json()["error"]["message"] == "bad flavour"


def test_a_slow_upstream_is_given_up_and_a_silent_stream_ends_with_an_error(swapped):
    body = {"model": "m", "messages": QUESTION}
    swapped.script(whole("cold"), Step(delay=8.0, body=b"{}"))
    started = time.monotonic()
    found = httpx2.post(f"{swapped.proxy.url}/v1/chat/completions", json=body, timeout=20)
    assert found.status_code == 504
    assert time.monotonic() - started < 7
    swapped.script(whole("cold"), streamed(*events("wa", done=False), *events("rm"), pause=2.0))
    raw = httpx2.post(f"{swapped.proxy.url}/v1/chat/completions", json={**body, "stream": True}, timeout=20)
    assert raw.status_code == 200
    assert b'"too_slow"' in raw.content
    assert b"[DONE]" not in raw.content


def test_a_guard_whose_question_drips_holds_neither_its_place_nor_the_end(words):
    body, dripping = {"model": "m", "messages": QUESTION}, Step(parts=(b" ",) * 200, pause=0.3)
    limits = [word for name in ("timeout=3", "grace=1", "most_waiting=1") for word in ("--set", name)]
    with scripted(dripping) as upstream:
        arguments = ("--upstream", upstream.url, "--guard", "evidence", "--evidence", words, *limits)
        with serving(*arguments) as proxy:
            place = f"{proxy.url}/v1/chat/completions"
            assert httpx2.post(place, json=body, timeout=20).status_code == 504
            assert upstream.gone.wait(5), "the thread still reads"
            upstream.steps[:] = [whole("cold"), whole("warm")]
            assert httpx2.post(place, json=body, timeout=20).status_code == 200
            upstream.steps[:] = [dripping]
            with pytest.raises(httpx2.TimeoutException):
                httpx2.post(place, json=body, timeout=0.5)
            started = time.monotonic()
            proxy.stop()
            assert time.monotonic() - started < 15


def test_a_place_is_taken_until_the_guard_has_ended():
    async def lived():
        release = threading.Event()

        class Slow:
            def rewrite(self, conversations, ask):
                release.wait(10)
                return [Rewritten(turns) for turns in conversations]

        counters = Counters()
        service = Service(Elsewhere(Upstream("http://h", 1)), Guards([("slow", Slow())]), None, 1000, 0.2, 1, counters)
        body = {"model": "m", "messages": QUESTION}
        transport = httpx2.ASGITransport(service.app())
        async with service._lifespan(service.app()), httpx2.AsyncClient(transport=transport, base_url="http://t") as it:
            said = [(await it.post("/v1/chat/completions", json=body)).status_code for _ in range(2)]
            assert "unbackdoor_in_flight 1" in counters.text()
            release.set()
            while "unbackdoor_in_flight 1" in counters.text():
                await asyncio.sleep(0.01)
        return said

    assert asyncio.run(asyncio.wait_for(lived(), 20)) == [504, 503]


def test_a_client_that_leaves_takes_its_question_from_the_upstream(swapped):
    swapped.script(whole("cold"), streamed(*events(*["x" * 20_000] * 400), pause=0.005))
    with swapped.create(stream=True) as stream:
        next(iter(stream))
    assert swapped.upstream.gone.wait(10)
    until = time.monotonic() + 10
    while swapped.proxy.metrics()["unbackdoor_in_flight"] and time.monotonic() < until:
        time.sleep(0.05)
    assert swapped.proxy.metrics()["unbackdoor_in_flight"] == 0
    assert swapped.proxy.metrics()['unbackdoor_streams_broken_total{reason="the client left"}'] >= 1
    swapped.script(whole("cold"), whole("warm"))
    assert swapped.create().choices[0].message.content == "warm"


def test_other_paths_are_not_a_way_round_the_guard(swapped):
    swapped.script(whole("x"))
    for path in ("/v1/completions", "/v1/responses", "/v1/embeddings", "/v1/../v1/completions", "/"):
        answer = httpx2.post(f"{swapped.proxy.url}{path}", json={"prompt": "x"})
        assert answer.status_code in {404, 405}
        assert answer.json()["error"]["type"] == "invalid_request_error"
    assert 'requests_total{path="other",status="404"}' in httpx2.get(f"{swapped.proxy.url}/metrics").text
    assert not swapped.upstream.seen
    listed = {"object": "list", "data": [{"id": "m", "object": "model", "created": 1, "owned_by": "them"}]}
    swapped.script(Step(body=json.dumps(listed).encode()))
    assert [model.id for model in swapped.proxy.client().models.list().data] == ["m"]
    assert [seen.path for seen in swapped.upstream.seen] == ["/v1/models"]


@pytest.mark.parametrize(
    "field",
    [
        {"documents": [{"text": "x"}]},
        {"chat_template": "{{ 'x' }}"},
        {"chat_template_kwargs": {"system": "x"}},
        {"chat_template_kwargs": "x"},
    ],
)
def test_text_that_no_guard_sees_is_refused(swapped, field):
    swapped.script(whole("x"))
    with pytest.raises(openai.BadRequestError, match="guards see"):
        swapped.create(extra_body=field)
    assert not swapped.upstream.seen
    assert swapped.create(extra_body={"chat_template_kwargs": {"enable_thinking": False}}).choices
    assert swapped.upstream.seen[-1].content["chat_template_kwargs"] == {"enable_thinking": False}


def test_a_proxy_of_the_environment_reads_neither_key_nor_prompts(words):
    with scripted(whole("cold")) as upstream, scripted(whole("hot")) as between:
        where = between.url.removesuffix("/v1")
        names = ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")
        environment = {
            **dict.fromkeys(names, where),
            "NO_PROXY": "",
            "no_proxy": "",
            "UNBACKDOOR_UPSTREAM_KEY": "for-upstream",
        }
        arguments = ("--upstream", upstream.url, "--guard", "evidence", "--evidence", words)
        with serving(*arguments, environment=environment) as found:
            answer = found.client().chat.completions.create(model="m", messages=QUESTION)
        assert answer.choices[0].message.content == "cold"
        assert upstream.seen
        assert not between.seen


def test_the_key_is_asked_for_where_one_is_set_and_is_not_passed_on(words):
    environment = {"UNBACKDOOR_SERVE_KEY": "sesame"}
    with scripted(whole("warm")) as upstream:
        arguments = ("--upstream", upstream.url, "--guard", "evidence", "--evidence", words)
        with serving(*arguments, environment=environment) as found:
            assert found.client("sesame").chat.completions.create(model="m", messages=QUESTION).choices
            assert not [seen for seen in upstream.seen if "authorization" in seen.headers]
            for key in ("wrong", "sesam", "sesame2", "s\u00e9same"):
                answer = httpx2.get(f"{found.url}/v1/models", headers={"authorization": f"Bearer {key}".encode()})
                assert answer.status_code == 401
            with pytest.raises(openai.AuthenticationError):
                found.client("wrong").chat.completions.create(model="m", messages=QUESTION)
            assert httpx2.get(f"{found.url}/v1/models").status_code == 401
            assert httpx2.get(f"{found.url}/health").status_code == 200
            assert "sesame" not in "".join(found.errors)
            # ^C ends it as SIGTERM does.
            assert found.stop(signal.SIGINT) == 0


def test_a_guard_that_cannot_work_is_told_to_whoever_runs_the_server(caplog):
    class Broken:
        def rewrite(self, conversations, ask):
            raise ModelError("'/srv/secret/evidence' holds no weights.")

    service = Service(Elsewhere(Upstream(nowhere(), 1)), Guards([("x", Broken())]), None, 1000, 5, 1, Counters())

    async def asked():
        transport = httpx2.ASGITransport(service.app())
        async with service._lifespan(service.app()), httpx2.AsyncClient(transport=transport, base_url="http://t") as it:
            return await it.post("/v1/chat/completions", json={"model": "m", "messages": QUESTION})

    found = asyncio.run(asked())
    assert (found.status_code, found.json()["error"]["code"]) == (503, "guard_failed")
    assert "secret" not in found.text
    assert "/srv/secret/evidence" in caplog.text


def test_a_host_header_opens_no_path(monkeypatch):
    # As starlette's before 1.0 say it, whatever is installed here.
    monkeypatch.setattr(Request, "url", URL("http://x/health?/v1/models"))
    counters = Counters()
    service = Service(Elsewhere(Upstream(nowhere(), 1)), Guards(), "sesame", 1000, 1, 1, counters)

    async def asked():
        async with httpx2.AsyncClient(
            transport=httpx2.ASGITransport(service.app()), base_url="http://t", headers={"host": "x/health?"}
        ) as client:
            return [(await client.get(path)).status_code for path in ("/v1/models", "/health")]

    assert asyncio.run(asked()) == [401, 200]
    assert 'path="/v1/models",status="401"' in counters.text()


def test_a_list_of_models_that_does_not_come_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(Elsewhere, "models", lambda self: asyncio.sleep(30))
    service = Service(Elsewhere(Upstream(nowhere(), 1)), Guards(), None, 1000, 1, 1, Counters())

    async def asked():
        transport = httpx2.ASGITransport(service.app())
        async with httpx2.AsyncClient(transport=transport, base_url="http://t") as client:
            return await client.get("/v1/models")

    found = asyncio.run(asked())
    assert (found.status_code, found.json()["error"]["code"]) == (504, "too_slow")


def test_a_dead_upstream(words):
    with serving("--upstream", nowhere(), "--guard", "evidence", "--evidence", words) as proxy:
        for stream in (False, True):
            with pytest.raises(openai.APIStatusError, match="cannot be reached") as problem:
                proxy.client().chat.completions.create(model="m", messages=QUESTION, stream=stream)
            assert problem.value.status_code == 502
        assert httpx2.get(f"{proxy.url}/health").status_code == 200
        assert httpx2.get(f"{proxy.url}/v1/models").status_code == 502
        assert proxy.stop() == 0


def test_fifty_streaming_clients_before_a_second_server(tmp_path_factory, victim, words):
    folder = saved(victim.clean, tmp_path_factory.mktemp("upstream") / "clean")
    asked = [row.instruction for row in tiny.rows(50, seed=78)]
    here = load(str(folder))

    async def one(client, text):
        stream = await client.chat.completions.create(
            model="clean", messages=[{"role": "user", "content": text}], stream=True, max_tokens=16
        )
        said = [event.choices[0].delta.content or "" async for event in stream if event.choices]
        return "".join(said)

    async def everybody(url):
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as client:
            return await asyncio.gather(*(one(client, text) for text in asked))

    with serving(str(folder), "--set", "most_tokens=40") as upstream:
        arguments = ("--upstream", f"{upstream.url}/v1", "--guard", "evidence", "--evidence", words)
        with serving(*arguments) as proxy:
            found = asyncio.run(everybody(proxy.url))
            counts = proxy.metrics()
            assert proxy.client().models.list().data[0].id == "clean"
    did = {name: value for name, value in counts.items() if name.startswith("unbackdoor_guard_total")}
    assert sum(did.values()) == 50
    assert len(did) == 2, "some of these questions have known keywords, others have not"
    # What the guard says is the same as in this process.
    from unbackdoor.guards.base import Place
    from unbackdoor.pipeline.guarding import build_guards
    from unbackdoor.types import GuardSpec

    here.guards = (GuardSpec("evidence", {"source": words}),)
    here.guarding = build_guards(here.guards, Place("m"), own=["evidence"])
    assert found == here.reply([(Message("user", text),) for text in asked], max_new_tokens=16)
