"""Parts of the server by themselves: the engine, counters, a request's fields, what makes no server."""

from __future__ import annotations

import asyncio
import json
import queue
import threading

import pytest
import torch

import tiny
from evidence.mini_wordnet import write
from unbackdoor.errors import ModelError, UserError
from unbackdoor.model.guard import FOREVER, Patience
from unbackdoor.run import Silent
from unbackdoor.serve import run
from unbackdoor.serve.access import client_key, upstream_key
from unbackdoor.serve.backends import Here
from unbackdoor.serve.counters import Counters
from unbackdoor.serve.engine import AskEngine, End, Engine, Gone, Job, Sampling, _Draws
from unbackdoor.serve.protocol import Problem, parse, read_json
from unbackdoor.serve.turns import merged, turns_of, with_turns
from unbackdoor.types import Message

QUESTION = (Message("user", "what is the opposite of hot?"),)


@pytest.fixture
def engine():
    made = Engine(tiny.tiny_lm(seed=5), most=4)
    yield made
    made.stop()


def answer(engine, turns=QUESTION, limit=10, **more):
    box = queue.SimpleQueue()
    engine.submit(Job(engine.encode(turns), limit, box.put, **more))
    text = ""
    while not isinstance(said := box.get(timeout=60), End):
        if isinstance(said, Exception):
            raise said
        text += said
    return text, said


def test_questions_in_one_batch_are_answered_as_alone(engine):
    asked = [(Message("user", text),) for text in ("what is hot?", "where?", "which colour has grass?", "dog", "a b")]
    wanted = tiny.tiny_lm(seed=5).reply(asked, max_new_tokens=10)
    ask = AskEngine(engine, 10, FOREVER)
    assert ask(asked, 10) == wanted
    assert [answer(engine, turns)[0] for turns in asked] == wanted
    assert ask.special == {"<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"}
    assert not ask.fits((Message("user", "hot " * 250),))


def test_a_guards_question_that_does_not_fit_or_is_none_is_refused_and_harms_nobody(engine, monkeypatch):
    ask, long = AskEngine(engine, 10, FOREVER), (Message("user", "hot " * 250),)
    assert ask.fits((Message("user", "hot " * 100),))
    assert not ask.fits((Message("user", "hot " * 100),), 200)
    with pytest.raises(Problem, match="more tokens than the model reads") as problem:
        ask([QUESTION, long], 10)
    assert problem.value.status == 400
    assert engine._waiting.empty(), "none of them is asked"
    assert answer(engine)[1].tokens == 10
    monkeypatch.setattr(engine, "encode", lambda turns: (_ for _ in ()).throw(ModelError("no such turns.")))
    with pytest.raises(Problem, match="no such turns") as problem:
        ask([QUESTION], 10)
    assert problem.value.status == 400


def test_rows_of_different_lengths_end_when_they_should(engine):
    boxes = [queue.SimpleQueue() for _ in range(3)]
    for limit, box in zip((1, 9, 4), boxes, strict=True):
        engine.submit(Job(engine.encode(QUESTION), limit, box.put))
    ends = []
    for box in boxes:
        while not isinstance(said := box.get(timeout=60), End):
            pass
        ends.append(said)
    assert [end.tokens for end in ends] == [1, 9, 4]
    assert {end.reason for end in ends} == {"length"}


def test_an_error_reaches_who_asked_and_the_next_question_is_answered(engine, monkeypatch):
    real = engine.lm.model.forward
    monkeypatch.setattr(engine.lm.model, "forward", lambda **_: (_ for _ in ()).throw(RuntimeError("no memory")))
    with pytest.raises(RuntimeError, match="no memory"):
        answer(engine)
    monkeypatch.setattr(engine.lm.model, "forward", real)
    assert answer(engine)[1].tokens == 10


def test_a_question_that_nobody_waits_for_is_dropped(engine):
    gone = threading.Event()
    gone.set()
    with pytest.raises(Gone):
        AskEngine(engine, 10, Patience(cancelled=gone))([QUESTION], 10)
    leaving = threading.Event()
    box = queue.SimpleQueue()
    job = Job(engine.encode(QUESTION), 100_000, lambda said: (box.put(said), leaving.set()), cancelled=leaving)
    engine.submit(job)
    while not isinstance(said := box.get(timeout=60), End):
        pass
    assert said.tokens < 50


def test_a_decode_guard_acts_on_guarded_questions_only():
    class Cold:
        def tokens(self, lm, ids, limit):
            yield from lm.tokenizer("cold cold cold")["input_ids"]

    made = Engine(tiny.tiny_lm(seed=5), most=4, decode=Cold())
    try:
        assert answer(made, guarded=True)[0] == "cold cold cold"
        assert answer(made)[0] == tiny.tiny_lm(seed=5).reply([QUESTION], max_new_tokens=10)[0]
    finally:
        made.stop()


def test_draws_follow_temperature_top_p_and_seed():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).repeat(2, 1)

    def drawn(**settings):
        jobs = [Job((), 1, print), Job((), 1, print, Sampling(**settings))]
        draws = _Draws(jobs)
        return [draws(logits, [0, 1]).tolist() for _ in range(800)]

    plain = drawn(temperature=1.0, seed=1)
    assert {first for first, _ in plain} == {0}, "the greedy row beside it stays greedy"
    shares = [sum(second == token for _, second in plain) / 800 for token in range(4)]
    assert shares == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.06)
    assert plain == drawn(temperature=1.0, seed=1) != drawn(temperature=1.0, seed=2)
    assert {second for _, second in drawn(temperature=1.0, top_p=0.7, seed=1)} == {0, 1}
    assert {second for _, second in drawn(temperature=1.0, top_p=0.01, seed=1)} == {0}
    assert sum(second == 0 for _, second in drawn(temperature=0.1, seed=1)) > 780
    assert {second for _, second in drawn(temperature=1e-40, seed=1)} == {0}


def test_a_row_that_cannot_be_drawn_ends_alone(engine, monkeypatch):
    real = _Draws._draw
    assert answer(engine, sampling=Sampling(1e-40))[0] == answer(engine)[0]

    def draw(self, logits, row):
        return real(self, logits * float("nan") if self.sampling[row].seed == 7 else logits, row)

    monkeypatch.setattr(_Draws, "_draw", draw)
    boxes = [queue.SimpleQueue() for _ in range(2)]
    for seed, box in zip((7, 8), boxes, strict=True):
        engine.submit(Job(engine.encode(QUESTION), 10, box.put, Sampling(1.0, 1.0, seed)))
    assert isinstance(boxes[0].get(timeout=60), RuntimeError)
    while not isinstance(said := boxes[1].get(timeout=60), End):
        assert isinstance(said, str)
    assert boxes[0].empty()


def test_counts_as_text():
    counters = Counters()
    counters.add("requests_total", labels={"path": 'a"\\\n', "status": "200"})
    counters.add("in_flight")
    counters.add("in_flight", -1)
    counters.took(0.3)
    counters.took(500)
    text = counters.text()
    assert 'unbackdoor_requests_total{path="a\\"\\\\\\n",status="200"} 1\n' in text
    assert "unbackdoor_in_flight 0\n" in text
    assert 'chat_seconds_bucket{le="0.1"} 0\n' in text
    assert 'chat_seconds_bucket{le="0.5"} 1\n' in text
    assert 'chat_seconds_bucket{le="+Inf"} 2\n' in text
    assert "chat_seconds_count 2\n" in text
    assert text.endswith("\n")
    assert all(line.startswith(("# ", "unbackdoor_")) for line in text.splitlines())


def test_turns_that_did_not_change_leave_the_request_as_it_came():
    content = {
        "messages": [{"role": "developer", "content": "s", "name": "n"}, {"role": "user", "content": "q"}],
        "x": 1,
    }
    places, turns = turns_of(content)
    assert turns == (Message("system", "s"), Message("user", "q"))
    assert with_turns(content, places, turns, turns) == content
    changed = with_turns(content, places, turns, (turns[0], Message("user", "e q")))
    assert changed["messages"][0] == content["messages"][0]
    assert changed["messages"][1] == {"role": "user", "content": "e q"}
    assert content["messages"][1]["content"] == "q"
    odd = {"role": ["user"], "content": "x"}
    for bad in ("x", [], [1], [{"role": "assistant"}], [odd], [odd, {"role": "user", "content": "q"}]):
        with pytest.raises(Problem):
            turns_of({"messages": bad})
    with pytest.raises(Problem):
        turns_of({})


def test_guarded_text_stands_where_the_first_text_stood_and_pictures_keep_their_order():
    first, second = ({"type": "image_url", "image_url": {"url": f"data:,{name}"}} for name in "ab")
    parts = [first, {"type": "text", "text": "what", "x": 1}, second, {"type": "text", "text": "is it?"}]
    content = {"messages": [{"role": "user", "content": parts}]}
    places, turns = turns_of(content)
    assert turns == (Message("user", "what\nis it?"),)
    (changed,) = with_turns(content, places, turns, (Message("user", "e what is it?"),))["messages"]
    assert changed["content"] == [first, {"type": "text", "text": "e what is it?", "x": 1}, second]
    (changed,) = with_turns(content | {"messages": [{"content": [first]}]}, [0], turns, (Message("user", "e"),))[
        "messages"
    ]
    assert changed["content"] == [{"type": "text", "text": "e"}, first]


def test_a_tools_result_as_the_last_message_is_refused_with_the_reason():
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": {}}]}
    for role in ("tool", "function"):
        messages = [{"role": "user", "content": "q"}, call, {"role": role, "content": "42"}]
        with pytest.raises(Problem, match=r"result of a tool\. No guard looks at those") as problem:
            turns_of({"messages": messages})
        assert problem.value.status == 400
        places, turns = turns_of({"messages": [*messages, {"role": "user", "content": "and?"}]})
        assert (places, turns) == ([0, 3], (Message("user", "q"), Message("user", "and?")))
        assert merged(turns) == (Message("user", "q\n\nand?"),)
    apart = (Message("system", "s"), Message("user", "q"), Message("assistant", "a"), Message("user", "r"))
    assert merged(apart) == apart


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
def test_what_is_no_number_in_json_is_refused(number):
    with pytest.raises(Problem, match="not JSON"):
        read_json(f'{{"temperature": {number}}}'.encode())


@pytest.mark.parametrize(
    "part",
    ["words", {"type": "input_text", "text": "words"}, {"type": "output_text", "text": "words"}, {"text": "words"},
     {"type": "refusal", "refusal": "words"}, {"type": "text", "text": ["words"]}, {"type": ["text"]}, None,
     {"type": "file", "file": {"file_data": "data:text/plain,words"}}],
    ids=range(9),
)  # fmt: skip
def test_a_part_that_guards_cannot_see_is_refused(part):
    picture, text = {"type": "image_url", "image_url": {"url": "data:,"}}, {"type": "text", "text": "q"}
    assert turns_of({"messages": [{"role": "user", "content": [picture, text]}]})[1] == (Message("user", "q"),)
    with pytest.raises(Problem, match="part 3 of the last message") as problem:
        turns_of({"messages": [{"role": "user", "content": [picture, text, part]}]})
    assert problem.value.status == 400


def test_the_longest_reply_is_the_smaller_of_two_limits():
    content = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
    assert parse(content)[0].limit is None
    assert parse({**content, "max_tokens": 5, "max_completion_tokens": 7})[0].limit == 7


def test_fields_that_say_nothing_are_no_reason_to_refuse():
    content = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
    silent = dict.fromkeys(("top_logprobs", "reasoning_effort", "tools", "temperature", "stop", "some_new_field"))
    idle = {"parallel_tool_calls": True, "prompt_cache_key": "k", "tool_choice": "auto", "user": "me"}
    options = {"include_usage": None, "include_obfuscation": False}
    request, _ = parse({**content, **silent, **idle, "stream_options": options})
    assert not request.stream_options.include_usage
    for told in ({"top_logprobs": 2}, {"reasoning_effort": "high"}, {"tool_choice": "required"}, {"messages": None}):
        with pytest.raises(Problem):
            parse({**content, **told})


@pytest.mark.parametrize(("most", "room"), [(512, 64), (20, 20)])
def test_a_reply_without_a_limit_has_what_is_left(engine, most, room):
    here = Here(engine, "m", most, Counters(), lambda: 0)
    body = {"model": "m", "messages": [{"role": "user", "content": "hot " * 100}]}
    question = here.understand(body)
    assert here.ask(question, FOREVER).reply_tokens == room
    prompt = len(engine.encode(question.turns))
    status, answer = asyncio.run(here.whole(question, question.turns, threading.Event()))
    usage = json.loads(answer)["usage"]
    assert (status, usage["prompt_tokens"], usage["completion_tokens"]) == (200, prompt, min(most, 256 - prompt))
    limited = here.understand({**body, "max_tokens": 5})
    assert here.ask(limited, FOREVER).reply_tokens == 5
    found = json.loads(asyncio.run(here.whole(limited, limited.turns, threading.Event()))[1])
    assert found["usage"]["completion_tokens"] == 5
    if most == 512:
        asking = here.understand({**body, "max_tokens": 300})
        with pytest.raises(Problem, match="the reply up to 300, more than the model reads"):
            asyncio.run(here.whole(asking, asking.turns, threading.Event()))
    long = here.understand({"model": "m", "messages": [{"role": "user", "content": "hot " * 260}]})
    with pytest.raises(Problem, match="the reply at least one, more than the model reads"):
        asyncio.run(here.whole(long, long.turns, threading.Event()))


@pytest.fixture
def words(tmp_path):
    return f"wordnet:{write(tmp_path / 'own')}"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "a model or --upstream"), ({"model": "x", "upstream": "http://h"}, "a model or --upstream"),
        ({"upstream": "http://h/v1"}, "give --guard"),
        ({"upstream": "h", "guards": {"evidence": {}}}, "needs --evidence"),
        ({"upstream": "h", "guards": {"evidence": {"source": "wordnet"}}}, "write --upstream http://HOST/v1"),
        ({"upstream": "http://u:pw@h", "guards": {"evidence": {"source": "wordnet"}}}, "UNBACKDOOR_UPSTREAM_KEY"),
        ({"upstream": "http://h", "guards": {"evidense": {}}}, "Did you mean 'evidence'"),
        ({"upstream": "http://h", "guards": {"evidence": {"source": "wordnet", "x": 1}}}, "no option 'x'"),
        ({"model": "./nothing/here"}, "no folder or file"),
        ({"upstream": "http://h", "guards": {"evidence": {"source": "wordnet"}}, "name": "x"}, "name say how"),
        ({"model": "x", "guards": {"evidence": {"source": "wordnet"}}, "evidence": "wordnet:x"}, "two sources"),
        ({"model": "builtin:smollm2-135m", "device": "tpu"}, "device"),
        (
            {"upstream": "http://h", "guards": {"evidence": {"source": "wordnet"}}, "key_from": "NONE_OF_THEM"},
            "NONE_OF_THEM, which is not set",
        ),
    ],
)  # fmt: skip
def test_what_makes_no_server(settings, said):
    with pytest.raises(UserError, match=said):
        run.check(run.ServeRecipe(**settings))


@pytest.mark.parametrize(
    ("environment", "url", "said"),
    [
        ({"UNBACKDOOR_UPSTREAM_KEY": "secret"}, "http://h/v1", "unencrypted to 'h'; use an https://"),
        ({"UNBACKDOOR_UPSTREAM_KEY": "secret"}, "http://10.0.0.1/v1", "unencrypted"),
        ({"UNBACKDOOR_UPSTREAM_KEY": "s\u00e9cret"}, "https://h/v1", "UNBACKDOOR_UPSTREAM_KEY holds no key"),
        ({"UNBACKDOOR_SERVE_KEY": "s\u00e9cret"}, "https://h/v1", "UNBACKDOOR_SERVE_KEY holds no key"),
        ({"UNBACKDOOR_SERVE_KEY": "se\ncret"}, "https://h/v1", "UNBACKDOOR_SERVE_KEY holds no key"),
        ({"UNBACKDOOR_SERVE_KEY": " \n"}, "https://h/v1", "holds blanks only"),
        ({}, "http://a..b/v1", "no URL"), ({}, "http://[v1.a]/v1", "no URL"), ({}, "http://a/v\x011", "no URL"),
        ({}, f"http://{'a' * 64}.de/v1", "no URL"),
    ],
    ids=range(10),
)  # fmt: skip
def test_keys_and_urls_that_cannot_be_sent_show_at_the_start(monkeypatch, words, environment, url, said):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=said) as problem:
        run.check(run.ServeRecipe(upstream=url, guards={"evidence": {"source": words}}))
    assert "cret" not in str(problem.value)


def test_a_key_loses_the_line_break_of_a_mounted_secret_and_goes_to_this_machine_or_in_secret(monkeypatch):
    monkeypatch.setenv("UNBACKDOOR_UPSTREAM_KEY", "key\n")
    monkeypatch.setenv("MINE", " key\r\n")
    for url in ("https://h/v1", "http://localhost:1/v1", "http://127.0.0.1/v1", "http://[::1]:8/v1"):
        assert upstream_key(url) == client_key("MINE", named=True) == "key"
    monkeypatch.setenv("UNBACKDOOR_UPSTREAM_KEY", "")
    assert upstream_key("http://h/v1") is client_key("NONE_OF_THEM", named=False) is None


def test_a_folder_is_called_by_its_name_however_it_is_written(tmp_path, monkeypatch):
    (tmp_path / "clean" / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to("clean")
    monkeypatch.chdir(tmp_path / "clean")
    written = {".": "clean", "inner/..": "clean", "../link": "link", "org/name": "name", "/": "model"}
    for model, name in written.items():
        assert run.name_of(run.ServeRecipe(model=model)) == name
    assert run.name_of(run.ServeRecipe(model=".", name="mine")) == "mine"


def test_a_decode_guard_cannot_stand_before_an_upstream(monkeypatch):
    class Decoding:
        acts_on = "decode"

    monkeypatch.setattr(run, "_own_guards", lambda recipe: {"cleangen": Decoding()})
    with pytest.raises(UserError, match="cannot stand before an upstream"):
        run.check(run.ServeRecipe(upstream="http://h/v1", guards={"cleangen": {}}))


def test_a_port_that_is_in_use_and_a_url_that_is_none(words):
    import socket

    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        recipe = run.ServeRecipe(
            upstream="http://h/v1", guards={"evidence": {"source": words}}, port=other.getsockname()[1]
        )
        with pytest.raises(UserError, match="give another --port"):
            run.serve(recipe, Silent(), print)
    with pytest.raises(UserError, match="no URL"):
        run.serve(recipe.model_copy(update={"upstream": "nowhere", "port": 0}), Silent(), print)
    with pytest.raises(UserError, match="give another --host"):
        run.serve(recipe.model_copy(update={"host": "256.1.1.1.1"}), Silent(), print)
