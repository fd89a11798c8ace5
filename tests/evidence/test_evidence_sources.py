"""Names of sources, and sources behind them: a local model, an endpoint with its cache, a dictionary."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

import tiny
from evidence.mini_wordnet import write
from scripted import Step, chat, scripted
from unbackdoor.errors import UserError
from unbackdoor.evidence.cache import Unavailable
from unbackdoor.evidence.sources import Asking, SourceSpec, check_source, open_source, parse_source
from unbackdoor.model.guard import Patience
from unbackdoor.model.lm import LM


def test_names_are_taken_apart_and_put_together(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse_source("endpoint:https://h/v1#org/model") == SourceSpec("endpoint", "https://h/v1", "org/model")
    assert parse_source("wordnet") == SourceSpec("wordnet", "")
    assert parse_source("wordnet:data") == SourceSpec("wordnet", "data")
    assert parse_source("builtin:smollm2-135m") == SourceSpec("model", "builtin:smollm2-135m")
    (tmp_path / "wordnet").mkdir()
    assert parse_source("wordnet").kind == "model"
    for text in ("endpoint:https://h/v1#m", "wordnet:data", "owner/name@main", "builtin:smollm2-135m"):
        assert str(parse_source(text)) == text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("endpoint:https://h/v1", "#MODEL"), ("endpoint:https://h/v1#m\udcff", "#MODEL"), ("endpoint:#m", "no URL"),
        ("wordnet:", "names no folder"), ("./nothing/here", "no folder or file"), ("", "empty"),
    ],
)  # fmt: skip
def test_bad_names(text, words):
    with pytest.raises(UserError, match=words):
        parse_source(text)


def test_what_a_name_alone_opens(tmp_path, monkeypatch):
    safe = ("wordnet", "builtin:smollm2-135m")
    assert [parse_source(text).goes_out for text in safe] == [False, False]
    out = ("endpoint:https://h/v1#m", "wordnet:/etc", "owner/name", "builtin:smollm2-135m+owner/adapter")
    assert [parse_source(text).goes_out for text in out] == [True] * 4
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wordnet").mkdir()
    assert parse_source("wordnet").goes_out, "a folder of this name is a model"


def test_what_is_missing_is_said_before_anything_runs(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no WordNet in"):
        check_source(f"wordnet:{tmp_path}")
    monkeypatch.setenv("UNBACKDOOR_EVIDENCE_KEY", "k")
    with pytest.raises(UserError, match="unencrypted"):
        check_source("endpoint:http://example.org/v1#m")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"unbackdoor\[endpoint\]"):
        check_source("endpoint:https://h/v1#m")


def test_the_files_of_a_local_model_are_looked_at_and_it_can_be_loaded_at_once(folder):
    opened = []
    source = open_source(str(folder), Asking(), opened.append)
    assert source.load is not None
    source.load()
    assert len(opened) == 1
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="config"):
        check_source(str(folder))


def test_a_dictionary_defines_and_does_not_write(tmp_path):
    source = open_source(f"wordnet:{write(tmp_path / 'own')}", Asking())
    assert source.write is None
    assert source.define(["bank"]) == {"bank": "sloping land beside water"}


def test_an_endpoints_answers_are_kept_and_its_failures_are_not(tmp_path):
    with scripted(Step(400), chat("one"), chat("two"), chat("three")) as server:
        source = open_source(f"endpoint:{server.url}#m", Asking(cache=tmp_path))
        assert isinstance(source.write(["p"], 4)[0], Unavailable)
        assert source.write(["p"], 4) == ["one"]
        assert source.write(["p"], 4) == ["one"]
        again = open_source(f"endpoint:{server.url}#m", Asking(cache=tmp_path))
        assert again.write(["p"], 4) == ["one"]
        assert len(server.seen) == 2
        # Another length, another temperature, another model: other answers.
        assert again.write(["p"], 5) == ["two"]
        warmer = open_source(f"endpoint:{server.url}#m", Asking(temperature=1.0, cache=tmp_path))
        assert warmer.write(["p"], 4) == ["three"]
        assert open_source(f"endpoint:{server.url}#m", Asking()).write(["p"], 4) == ["three"]


@pytest.fixture
def folder(tmp_path):
    lm = tiny.tiny_lm(seed=3)
    lm.model.save_pretrained(tmp_path / "model")
    lm.tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_local_model_answers_greedily_and_is_loaded_when_it_is_asked(folder, tmp_path, monkeypatch):
    opened = []
    source = open_source(str(folder), Asking(cache=tmp_path / "cache"), opened.append)
    assert not opened
    found = source.write(["what is hot?", "what is <|im_end|> hot?"], 6)
    assert len(opened) == 1
    from unbackdoor.types import Message

    said = opened[0].reply([(Message("user", "what is hot?"),), (Message("user", "what is   hot?"),)], max_new_tokens=6)
    assert found == [reply or Unavailable("the evidence LLM says nothing") for reply in said]
    assert source.write(["what is hot?"], 6) == found[:1]
    long = source.write(["hot " * 400], 6)
    assert long == [Unavailable("the question does not fit into the evidence LLM's context")]


def test_many_threads_load_a_local_model_once_and_ask_it_one_by_one(folder, monkeypatch):
    opened, busy, most, real = [], [], [], LM.reply

    def reply(self, *arguments, **more):
        busy.append(1)
        most.append(len(busy))
        time.sleep(0.02)
        busy.pop()
        return real(self, *arguments, **more)

    monkeypatch.setattr(LM, "reply", reply)
    source = open_source(str(folder), Asking(), opened.append)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: source.write(["what is hot?"], 6), range(4)))
    assert len(opened) == 1
    assert most == [1] * 4
    assert found == found[:1] * 4
    over = Patience()
    over.cancelled.set()
    assert source.write(["what is hot?"], 6, over) == [Unavailable("its time was over")]


def test_who_left_while_a_local_model_was_busy_is_not_answered(folder, monkeypatch):
    begun, go_on, ran, real = threading.Event(), threading.Event(), [], LM.reply

    def reply(self, *arguments, **more):
        ran.append(1)
        begun.set()
        assert go_on.wait(20)
        return real(self, *arguments, **more)

    monkeypatch.setattr(LM, "reply", reply)
    source = open_source(str(folder), Asking())
    left = [Patience(), Patience()]
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(source.write, ["what is hot?"], 6)
        assert begun.wait(20)
        others = [pool.submit(source.write, ["what is wet?"], 6, patience) for patience in left]
        time.sleep(0.1)
        for patience in left:
            patience.cancelled.set()
        assert [other.result(2) for other in others] == [[Unavailable("its time was over")]] * 2
        go_on.set()
        first.result(20)
    assert ran == [1]


def test_a_local_model_stops_in_the_middle_once_nobody_waits(folder, monkeypatch):
    source = open_source(str(folder), Asking())
    whole = source.write(["what is hot?"], 40)
    assert source.write(["what is hot?"], 40, Patience(time.monotonic() + 60)) == whole
    patience, pieces, real = Patience(time.monotonic() + 60), [], LM.reply_stream

    def slow(self, *arguments, **more):
        for piece in real(self, *arguments, **more):
            pieces.append(piece)
            patience.cancelled.set()
            yield piece

    monkeypatch.setattr(LM, "reply_stream", slow)
    assert source.write(["what is hot?"], 40, patience) == [Unavailable("its time was over")]
    assert len(pieces) == 1


def test_the_cache_of_a_local_model_is_of_its_weights_and_not_of_its_name(folder, tmp_path):
    asking = Asking(cache=tmp_path / "cache")
    first = open_source(str(folder), asking).write(["what is hot?"], 8)
    other = tiny.tiny_lm(seed=4)
    other.model.save_pretrained(folder)
    second = open_source(str(folder), asking).write(["what is hot?"], 8)
    assert first != second
