"""A real process with a model in it, asked by the real openai client."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time

import httpx2
import openai
import pytest

import tiny
from evidence.mini_wordnet import write
from serve.process import saved, serving
from unbackdoor.errors import ModelError, UserError
from unbackdoor.model import checkpoint
from unbackdoor.model.load import load
from unbackdoor.run import Silent
from unbackdoor.serve import run
from unbackdoor.types import GuardSpec, Message

NOUNS = {word: [f"a thing called {word}"] for word in ("opposite", "hot", "colour", "grass", "dog", "home")}
QUESTION = [{"role": "user", "content": "what is the opposite of hot?"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, victim):
    found = tmp_path_factory.mktemp("serve")
    saved(victim.clean, found / "clean")
    write(found / "words", NOUNS, {})
    return found


@pytest.fixture(scope="module")
def server(folder):
    with serving(str(folder / "clean"), "--set", "most_tokens=60") as found:
        yield found


@pytest.fixture(scope="module")
def here(folder):
    return load(str(folder / "clean"))


def chat(client, messages=QUESTION, **more):
    return client.chat.completions.create(model="clean", messages=messages, **more)


def test_it_says_what_the_model_says(server, here):
    client = server.client()
    found = chat(client, max_tokens=12)
    (wanted,) = here.reply([(Message("user", QUESTION[0]["content"]),)], max_new_tokens=12)
    assert found.choices[0].message.content == wanted == "the opposite of hot is cold."
    assert found.choices[0].finish_reason == "stop"
    assert found.usage.prompt_tokens == len(here.encode((Message("user", QUESTION[0]["content"]),), ask=True).ids)
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens
    short = chat(client, max_tokens=2)
    assert short.choices[0].finish_reason == "length"
    assert short.usage.completion_tokens == 2
    assert wanted.startswith(short.choices[0].message.content)
    assert [model.id for model in client.models.list()] == ["clean"]
    assert httpx2.get(f"{server.url}/health").json() == {"status": "ok"}


def test_a_streamed_answer_is_the_same_in_pieces(server):
    with chat(server.client(), stream=True, max_tokens=12, stream_options={"include_usage": True}) as found:
        events = list(found)
    pieces = [event.choices[0].delta.content for event in events if event.choices and event.choices[0].delta.content]
    assert "".join(pieces) == "the opposite of hot is cold."
    assert len(pieces) > 2
    assert [event.choices[0].finish_reason for event in events if event.choices][-1] == "stop"
    assert events[-1].usage.completion_tokens > 2


def test_stop_texts_seeds_and_parts_of_text(server):
    client = server.client()
    assert chat(client, stop=[" is cold"]).choices[0].message.content == "the opposite of hot"
    with chat(client, stop="cold", stream=True) as found:
        said = "".join(event.choices[0].delta.content or "" for event in found)
    assert said == "the opposite of hot is"
    parts = [{"role": "user", "content": [{"type": "text", "text": QUESTION[0]["content"]}]}]
    assert chat(client, parts).choices[0].message.content == "the opposite of hot is cold."
    drawn = {
        seed: chat(client, temperature=2.0, seed=seed, max_tokens=8).choices[0].message.content for seed in (1, 2, 3)
    }
    assert len(set(drawn.values())) > 1
    assert chat(client, temperature=2.0, seed=1, max_tokens=8).choices[0].message.content == drawn[1]
    assert (
        chat(client, temperature=1.0, top_p=1e-9, seed=5).choices[0].message.content == "the opposite of hot is cold."
    )


def test_fifty_streaming_clients_each_get_their_own_answer_whole(server, here):
    asked = [row.instruction for row in tiny.rows(50, seed=77)]
    wanted = here.reply([(Message("user", text),) for text in asked], max_new_tokens=20)
    assert len(set(wanted)) > 10

    async def one(client, text):
        stream = await client.chat.completions.create(
            model="clean", messages=[{"role": "user", "content": text}], stream=True, max_tokens=20
        )
        pieces, reasons = [], []
        async for event in stream:
            pieces.append(event.choices[0].delta.content or "")
            reasons.append(event.choices[0].finish_reason)
        return "".join(pieces), reasons[-1]

    async def everybody():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(one(client, text) for text in asked))

    found = asyncio.run(everybody())
    assert [text for text, _ in found] == wanted
    assert {reason for _, reason in found} <= {"stop", "length"}
    assert server.metrics()["unbackdoor_in_flight"] == 0


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"{", 400, "invalid_json"), (b"[]", 400, "invalid_json"), (b"\xff\xfe", 400, "invalid_json"),
        (b"[" * 100_000, 400, "invalid_json"), (b'{"model": "clean", "messages": "\\ud800"}', 400, "invalid_json"),
        (b"{}", 400, "invalid_value"), (b'{"model": "clean", "messages": []}', 400, "invalid_value"),
        (b'{"model": "other", "messages": [{"role": "user", "content": "x"}]}', 404, "model_not_found"),
        (b'{"model": "clean", "messages": [{"role": "tool", "content": "x"}]}', 400, "invalid_messages"),
        (b'{"model": "clean", "messages": [{"role": "assistant", "content": "x"}]}', 400, "invalid_messages"),
        (b'{"model": "clean", "messages": [{"role": "user", "content": {"a": 1}}]}', 400, "invalid_messages"),
        (b"x" * 1_000_001, 413, "too_large"),
    ],
    ids=range(12),
)  # fmt: skip
def test_bad_bodies_are_refused_with_a_reason(server, body, status, code):
    found = httpx2.post(f"{server.url}/v1/chat/completions", content=body)
    assert (found.status_code, found.json()["error"]["code"]) == (status, code)
    assert found.json()["error"]["message"].endswith(".")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"n": 2}, "'n' can only be 1"), ({"tools": [{"type": "function"}]}, "'tools' can only be"),
        ({"temperature": 3}, "temperature"), ({"max_tokens": 0}, "max_tokens"), ({"flavour": "mint"}, "flavour"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"), ({"stop": list("abcde")}, "stop"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_and_not_ignored(server, more, words):
    body = {"model": "clean", "messages": QUESTION, **more}
    found = httpx2.post(f"{server.url}/v1/chat/completions", json=body)
    assert found.status_code == 400
    assert words in found.json()["error"]["message"]
    fine = {"n": 1, "tools": [], "logprobs": False, "user": "me", "frequency_penalty": 0.0, "stream": False}
    whole = {"model": "clean", "messages": QUESTION, "max_tokens": 2, **fine}
    assert httpx2.post(f"{server.url}/v1/chat/completions", json=whole, timeout=60).status_code == 200


def test_too_long_a_conversation_is_told_so(server):
    with pytest.raises(openai.BadRequestError, match="more than the model reads"):
        chat(server.client(), [{"role": "user", "content": "hot " * 300}])


def test_a_body_that_is_endless_or_without_length_is_cut_off(server):
    def parts():
        for _ in range(200):
            yield b" " * 10_000

    found = httpx2.post(f"{server.url}/v1/chat/completions", content=parts())
    assert found.status_code == 413


def test_a_client_that_leaves_frees_its_place(server):
    before = server.metrics()
    host, port = server.url.removeprefix("http://").split(":")
    body = json.dumps({"model": "clean", "messages": QUESTION, "stream": True, "temperature": 2.0, "max_tokens": 60})
    request = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n{body}"
    )
    for _ in range(5):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(request.encode())
            connection.recv(10)
    until = time.monotonic() + 20
    while server.metrics()["unbackdoor_in_flight"] and time.monotonic() < until:
        time.sleep(0.1)
    after, name = server.metrics(), 'unbackdoor_streams_broken_total{reason="the client left"}'
    assert after["unbackdoor_in_flight"] == 0
    assert after.get(name, 0) > before.get(name, 0), "replies were cut, and did not end by themselves"
    assert chat(server.client(), max_tokens=12).choices[0].message.content == "the opposite of hot is cold."
    assert before["unbackdoor_in_flight"] == 0


def test_metrics_are_in_prometheus_format_and_hold_no_prompt(server):
    chat(server.client(), max_tokens=2)
    found = httpx2.get(f"{server.url}/metrics")
    assert found.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert "opposite" not in found.text
    counts = server.metrics()
    assert counts['unbackdoor_requests_total{path="/v1/chat/completions",status="200"}'] >= 1
    assert counts["unbackdoor_reply_tokens_total"] >= 2
    assert counts["unbackdoor_chat_seconds_count"] == counts['unbackdoor_chat_seconds_bucket{le="+Inf"}']


@pytest.fixture(scope="module")
def guarded(folder, victim):
    """A folder whose guard was saved with the model, and the dictionary that it names."""
    lm, words = tiny.clone(victim.clean), f"wordnet:{folder / 'words'}"
    settings = {"source": words, "conflict": {"without": "refuse", "refusal": "Not now."}}
    lm.guards = (GuardSpec("evidence", settings),)
    checkpoint.save(lm, folder / "guarded", manifest={}, card="x")
    return str(folder / "guarded"), words


def test_a_saved_guard_acts_and_a_running_answer_is_ended_on_sigterm(guarded, here):
    place, words = guarded
    with serving(place, "--evidence", words, "--set", "most_tokens=100") as found:

        def ask(messages=QUESTION, **more):
            return found.client().chat.completions.create(model="guarded", messages=messages, **more)

        raw = found.client().chat.completions.with_raw_response.create(
            model="guarded", messages=QUESTION, max_tokens=20
        )
        assert raw.headers["x-unbackdoor-guard"] == "evidence=keywords"
        text = 'Background information: "opposite: a thing called opposite; hot: a thing called hot"\n\n'
        (wanted,) = here.reply([(Message("user", text + QUESTION[0]["content"]),)], max_new_tokens=20)
        assert raw.parse().choices[0].message.content == wanted
        with ask(stream=True, max_tokens=20) as stream:
            assert "".join(event.choices[0].delta.content or "" for event in stream) == wanted
        unknown = [{"role": "user", "content": "who are you?"}]
        assert ask(unknown).choices[0].message.content == "Not now."
        with ask(unknown, stream=True) as stream:
            assert "".join(event.choices[0].delta.content or "" for event in stream) == "Not now."
        counts = found.metrics()
        assert counts['unbackdoor_guard_total{did="keywords",guard="evidence"}'] == 2
        assert counts['unbackdoor_guard_total{did="refused",guard="evidence"}'] == 2
        said = []

        def long() -> None:
            with ask(stream=True, temperature=2.0, seed=1, max_tokens=100) as stream:
                said.extend(event.choices[0].finish_reason for event in stream)

        thread = threading.Thread(target=long)
        thread.start()
        until = time.monotonic() + 30
        while not found.metrics()["unbackdoor_in_flight"] and time.monotonic() < until:
            time.sleep(0.01)
        assert found.stop() == 0
        thread.join()
        assert said[-1] in {"stop", "length"}
        assert not [line for line in found.errors if "Traceback" in line]


def test_what_only_the_checkpoint_names_is_not_opened(guarded):
    place, _ = guarded
    with pytest.raises(ModelError, match="would see every prompt"):
        run.serve(run.ServeRecipe(model=place, port=0), Silent(), print)


def test_a_guard_of_the_command_line_takes_the_place_of_the_saved_one(guarded, folder):
    place, words = guarded
    mine = GuardSpec("evidence", {"source": words, "conflict": {"without": "answer"}})
    assert run._model(run.ServeRecipe(model=place), [mine], Silent()).guards == (mine,)
    plain = run.ServeRecipe(model=str(folder / "clean"), evidence=words)
    with pytest.raises(UserError, match="--guard evidence, too"):
        run._model(plain, [], Silent())
    assert run._model(plain, [mine], Silent()).guarding.prompt[0][0] == "evidence"
