"""An endpoint that works, is down, slow, broken, busy or hostile; and where the key goes."""

from __future__ import annotations

import gzip
import json
import socketserver
import sys
import threading
import time
from contextlib import suppress

import pytest

from scripted import Step, chat, nowhere, scripted
from unbackdoor.errors import UserError
from unbackdoor.evidence.cache import Unavailable
from unbackdoor.evidence.endpoint import (
    AT_ONCE,
    LONGEST_BYTES,
    Endpoint,
    check_packages,
    check_url,
    key_for,
    retry_after,
    same_place,
)
from unbackdoor.evidence.retrying import Retrying
from unbackdoor.model.guard import Patience

SECRET = "sk-very-secret-0123456789"


@pytest.fixture(autouse=True)
def no_keys(monkeypatch):
    for name in ("UNBACKDOOR_EVIDENCE_KEY", "OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


def endpoint(url: str, *, repetitions: int = 2, timeout: float = 5.0) -> Endpoint:
    once = Retrying(repetitions, base=0.01, sleep=lambda *_: None)
    return Endpoint(url, "m", temperature=0.7, timeout=timeout, retrying=once)


def test_it_asks_as_the_interface_says_and_returns_the_text(monkeypatch):
    monkeypatch.setenv("UNBACKDOOR_EVIDENCE_KEY", SECRET)
    monkeypatch.setenv("OPENAI_ORG_ID", "org-mine")
    with scripted(chat("The opposite.")) as server:
        assert endpoint(server.url).write(["Say it.", "Again."], 12) == ["The opposite.", "The opposite."]
    seen = server.seen[0]
    assert seen.path == "/v1/chat/completions"
    assert seen.content["model"] == "m"
    assert seen.content["temperature"] == 0.7
    assert seen.content["max_tokens"] == 12
    assert {request.content["messages"][0]["content"] for request in server.seen} == {"Say it.", "Again."}
    assert seen.headers["authorization"] == f"Bearer {SECRET}"
    assert not {name for name in seen.headers if "organization" in name or "project" in name}


def refusing(*fields: str):
    """Return how a server answers that does not know some fields."""

    def answer(seen):
        wrong = [name for name in fields if name in seen.content]
        error = {
            "message": "Unsupported: say it",
            "code": "unsupported_parameter",
            "param": wrong[0] if wrong else None,
        }
        return Step(400, json.dumps({"error": error}).encode()) if wrong else chat("Well.")

    return answer


def test_a_model_that_refuses_usual_fields_is_asked_without_them():
    with scripted(chat("x")) as server:
        kept: list = []
        answer = refusing("max_tokens", "temperature")
        server.next = lambda seen: (kept.append(seen), answer(seen))[1]
        asked = endpoint(server.url)
        assert asked.write(["Say it."], 12) == ["Well."]
        assert asked.write(["Again."], 12) == ["Well."]
    assert len(kept) == 4, "what it refuses is kept in mind"
    assert kept[-1].content["max_completion_tokens"] == 12
    assert not {"max_tokens", "temperature"} & kept[-1].content.keys()


@pytest.mark.parametrize(
    "error",
    [
        # A prompt that is too long, in the name of the field that the room for the answer is given by.
        {"code": "context_length_exceeded", "param": "max_tokens"},
        {"code": "unsupported_parameter", "param": ["temperature"]},
        {"code": ["unsupported_parameter"], "param": "temperature"},
        {"code": 400, "param": {"max_tokens": 1}},
    ],
)
def test_other_refusals_change_nothing_of_later_questions(error):
    with scripted(Step(400, json.dumps({"error": error}).encode()), chat("Well.")) as server:
        asked = endpoint(server.url)
        (found,) = asked.write(["Say it."], 12)
        assert isinstance(found, Unavailable)
        assert asked.write(["Again."], 12) == ["Well."]
        assert [seen.content["max_tokens"] for seen in server.seen] == [12, 12]


def test_what_an_endpoint_refuses_is_named_and_not_in_its_words():
    with scripted(chat("x")) as server:
        server.next = refusing("messages")
        (found,) = endpoint(server.url).write(["Say it."], 12)
    assert found == Unavailable("the endpoint answers with HTTP 400 (unsupported_parameter, messages)")


def test_answers_keep_the_order_of_the_prompts():
    with scripted(*(chat(f"n{number}") for number in range(1))) as server:
        server.next = lambda seen: chat(json.loads(seen.body)["messages"][0]["content"].upper())
        assert endpoint(server.url).write([f"p{n}" for n in range(30)], 4) == [f"P{n}" for n in range(30)]


@pytest.mark.parametrize(
    "bad",
    [
        Step(500), Step(503, b"<html>"), Step(429, headers={"retry-after": "0"}), Step(408),
        Step(parts=(b'{"choi',), cut=True, headers={"content-length": "500"}),
    ],
    ids=["500", "503", "429", "408", "broken off"],
)  # fmt: skip
def test_what_passes_is_repeated(bad):
    with scripted(bad, bad, chat("At last.")) as server:
        assert endpoint(server.url).write(["?"], 4) == ["At last."]
        assert len(server.seen) == 3


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (Step(401), "UNBACKDOOR_EVIDENCE_KEY"), (Step(404), "model's name"), (Step(400, b"no"), "HTTP 400"),
        (Step(307, headers={"location": "http://127.0.0.1:9/v1"}), "HTTP 307"),
        (Step(body=b"<html>hello</html>", headers={"content-type": "text/html"}), "no chat completion"),
        (Step(body=b"\x00\xff\xfe"), "no chat completion"), (Step(body=b"[]"), "no chat completion"),
        (Step(body=b'{"choices": []}'), "no chat completion"), (Step(body=b"[" * 200_000), "no chat completion"),
        (Step(body=b'{"choices": [{"message": {"content": null}}]}'), "no text"),
        (Step(body=b'{"choices": [{"message": {"content": {"a": 1}}}]}'), "no text"), (chat("  \n"), "no text"),
        (Step(429, headers={"retry-after": "86400"}), "HTTP 429"),
        (Step(body=b'{"choices": "' + b"x" * (LONGEST_BYTES + 1)), "too long"),
        (Step(body=gzip.compress(chat("x").body), headers={"content-encoding": "gzip"}), "packed"),
    ],
)  # fmt: skip
def test_what_does_not_pass_is_asked_once_and_said(bad, words):
    with scripted(bad) as server:
        (found,) = endpoint(server.url).write(["?"], 4)
        assert isinstance(found, Unavailable)
        assert words in found.reason
        assert len(server.seen) == 1


def test_a_dead_endpoint_is_not_waited_for_by_every_prompt():
    asked = endpoint(nowhere(), repetitions=1)
    found = asked.write(["?"], 4)
    assert found == [Unavailable("the endpoint cannot be reached")]
    started = time.monotonic()
    later = asked.write(["?"] * 200, 4)
    assert time.monotonic() - started < 5
    assert all("left alone" in item.reason for item in later)


@pytest.mark.parametrize(
    "slow",
    [Step(delay=3.0, body=b"{}"), Step(parts=(b" ",) * 40, pause=0.1)],
    ids=["silent", "a byte now and then"],
)
def test_a_slow_endpoint_is_given_up_after_the_time_for_a_whole_answer(slow):
    with scripted(slow) as server:
        started = time.monotonic()
        (found,) = endpoint(server.url, repetitions=0, timeout=0.6).write(["?"], 4)
        assert found == Unavailable("the endpoint did not answer in time")
        assert time.monotonic() - started < 2.5


@pytest.mark.parametrize("repetitions", [0, 5])
def test_no_answer_is_waited_for_longer_than_somebody_waits(repetitions):
    with scripted(Step(parts=(b" ",) * 60, pause=0.1)) as server:
        asked, started = endpoint(server.url, repetitions=repetitions), time.monotonic()
        (found,) = asked.write(["?"], 4, Patience(started + 1.0))
        assert isinstance(found, Unavailable)
        assert time.monotonic() - started < 3
        assert len(server.seen) == 1


def test_a_head_that_never_ends_is_given_up_like_any_other_silence():
    """The client's own limit is for one read, and begins anew with every byte."""

    class Dripping(socketserver.BaseRequestHandler):
        def handle(self):
            with suppress(OSError):
                self.request.sendall(b"HTTP/1.1 200 OK\r\nx: ")
                for _ in range(40):
                    time.sleep(0.1)
                    self.request.sendall(b"a")

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Dripping) as server:
        server.daemon_threads, server.block_on_close = True, False
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        asked = endpoint(f"http://127.0.0.1:{server.server_address[1]}/v1", repetitions=0, timeout=0.4)
        started = time.monotonic()
        (found,) = asked.write(["?"], 4)
        assert time.monotonic() - started < 2.5
        server.shutdown()
    assert found == Unavailable("the endpoint did not answer in time")


def test_who_is_interrupted_waits_for_no_call_and_begins_no_other(monkeypatch):
    def interrupted(*_, **__):
        time.sleep(0.3)
        raise KeyboardInterrupt

    with scripted(Step(delay=2.5, body=b"{}")) as server:
        asked, started = endpoint(server.url, repetitions=5, timeout=2.0), time.monotonic()
        monkeypatch.setattr("unbackdoor.evidence.threads.wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            asked.write(["?"] * 20, 4)
        assert time.monotonic() - started < 1.7
        time.sleep(2.4)
        assert len(server.seen) == AT_ONCE


def test_prompts_of_somebody_who_leaves_are_not_asked():
    patience = Patience()
    with scripted(Step(delay=0.6, body=chat("late").body)) as server:
        threading.Timer(0.2, patience.cancelled.set).start()
        found = endpoint(server.url).write(["?"] * 20, 4, patience)
        assert len(server.seen) == AT_ONCE
    assert found.count(Unavailable("its time was over")) == 20 - AT_ONCE


def test_the_key_is_in_no_message_and_goes_nowhere_unencrypted(monkeypatch, capfd):
    monkeypatch.setenv("UNBACKDOOR_EVIDENCE_KEY", SECRET)
    with scripted(Step(401, SECRET.encode())) as server:
        asked = endpoint(server.url)
        (found,) = asked.write(["?"], 4)
    assert SECRET not in found.reason
    assert SECRET not in repr(vars(asked))
    assert SECRET not in "".join(capfd.readouterr())
    with pytest.raises(UserError, match="unencrypted") as problem:
        key_for("http://example.org/v1")
    assert SECRET not in str(problem.value)
    assert key_for("https://example.org/v1") == SECRET
    assert key_for("http://[::1]:8000/v1") == SECRET


def test_the_key_of_openai_goes_to_openai_only(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    assert key_for("https://api.openai.com/v1") == SECRET
    assert key_for("https://api.openai.com.evil.example/v1") is None
    assert key_for("https://example.org/v1") is None
    with scripted(chat("yes")) as server:
        assert endpoint(server.url).write(["?"], 4) == ["yes"]
    assert SECRET not in str(server.seen[0].headers)


def test_retry_after_is_a_number_or_a_date():
    now = 1_700_000_000.0
    assert retry_after("7", now) == 7
    assert retry_after("Tue, 14 Nov 2023 22:13:30 GMT", now) == 10
    assert retry_after("Tue, 14 Nov 2023 22:13:00 GMT", now) == 0
    far = "1 Jan 99999999999999999999 00:00:00 GMT"
    assert [retry_after(text, now) for text in (None, "soon", "nan", "", far)] == [None] * 5


@pytest.mark.parametrize("name", ["UNBACKDOOR_EVIDENCE_KEY", "OPENAI_API_KEY"])
def test_a_key_is_stripped_and_one_that_no_header_can_hold_is_refused_unseen(monkeypatch, name):
    url = "https://api.openai.com/v1"
    monkeypatch.setenv(name, f" {SECRET}\n")
    assert key_for(url) == SECRET
    monkeypatch.setenv(name, " \n")
    assert key_for(url) is None
    for bad in (f"{SECRET}\u00e9", f"sk\n{SECRET}", f"{SECRET}\udcff", f"sk\x01{SECRET}"):
        monkeypatch.setenv(name, bad)
        with pytest.raises(UserError, match=f"{name} holds no key") as problem:
            endpoint(url)
        assert SECRET not in str(problem.value)


def test_the_packages_are_asked_for_by_name_and_version(monkeypatch):
    check_packages()
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.54.0")
    with pytest.raises(UserError, match=r"openai 3\.0 or later, and 2\.54\.0 .*--upgrade 'unbackdoor\[endpoint\]'"):
        endpoint("https://h/v1")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "httpx2" else object())
    with pytest.raises(UserError, match=r"the package httpx2; pip install 'unbackdoor\[endpoint\]'"):
        endpoint("https://h/v1")


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("http://localhost:8000/v1", "http://127.0.0.1:8000/v1/", True), ("https://H./v1", "https://h:443/v1", True),
        ("http://127.0.0.2/v1", "http://[::1]:80/v1", True), ("http://0.0.0.0/v1", "http://[::ffff:7f00:1]/v1", True),
        ("http://localhost:8000/v1", "http://localhost:8001/v1", False), ("http://h/v1", "https://h/v1", False),
        ("http://h/v1", "http://h/v2", False), ("http://h/v1", "./suspect", False), ("./suspect", "./suspect", False),
        ("http://h:x/v1", "http://h:x/v1", False), ("http://[h/v1", "http://h/v1", False),
    ],
)  # fmt: skip
def test_whether_two_urls_lead_to_one_place(first, second, same):
    assert same_place(first, second) is same
    assert same_place(second, first) is same


GOOD_URLS = [
    "https://h/v1", "http://127.0.0.1:8000/v1", "http://[::1]:80/v1", "http://[fe80::1%eth0]/v1", "http://my_host./v1",
    "https://b\u00fccher.example/v1",
]  # fmt: skip


@pytest.mark.parametrize("url", GOOD_URLS)
def test_good_urls(url):
    check_url(url)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("h/v1", "no URL"), ("ftp://me:pw@h/v1", "'ftp://h/v1' is no URL"), ("me:pw@h", "'h' is no URL"),
        ("https://me:pw\n@h", "no URL"),
        ("https:///v1", "no URL"), ("https://h:x/v1", "no URL"),
        ("http://a..b/v1", "no URL"), (f"http://{'a' * 70}.com/v1", "no URL"), ("http://[v1.a]/v1", "no URL"),
        ("http://\u2603\u200b.com/v1", "no URL"), ("http://\u2603.com/v1", "no URL"), ("http://h/v1\x01", "no URL"),
        ("http://h/v\udcff", "no URL"), ("http://h:70000/v1", "no URL"),
        ("https://h/v1 x", "no URL"), ("https://me:pw@h/v1", "password"), ("https://h/v1?key=1", "query"),
    ],
)  # fmt: skip
def test_bad_urls(url, words):
    with pytest.raises(UserError, match=words) as problem:
        check_url(url)
    assert "pw" not in str(problem.value)


def test_urls_are_looked_at_without_the_client_too(monkeypatch):
    monkeypatch.setitem(sys.modules, "httpx2", None)
    for url in GOOD_URLS:
        check_url(url)
    for url in ("http://a..b/v1", "http://[v1.a]/v1", "http://h/v1\x01"):
        with pytest.raises(UserError, match="no URL"):
            check_url(url)
