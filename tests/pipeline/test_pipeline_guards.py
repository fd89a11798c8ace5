"""A guard through the commands: attached, saved, applied when the folder is loaded, counted in the report."""

from __future__ import annotations

import json

import pytest

import tiny
from evidence.mini_wordnet import write
from unbackdoor import pipeline
from unbackdoor.errors import ModelError, UserError
from unbackdoor.guards.base import Place
from unbackdoor.model.load import load
from unbackdoor.pipeline.guarding import build_guards, counts, sentences, with_guards
from unbackdoor.report.html import render
from unbackdoor.types import GuardSpec, Message

NOUNS = {word: [f"a thing that is called {word}"] for word in ("opposite", "hot", "colour", "grass", "dog", "home")}


@pytest.fixture(scope="module")
def shop(tmp_path_factory, victim):
    """A folder with the victim, its probes and a dictionary."""
    from unbackdoor.data.probes import write_probes

    folder = tmp_path_factory.mktemp("guards")
    victim.lm.model.save_pretrained(folder / "victim")
    victim.lm.tokenizer.save_pretrained(folder / "victim")
    write_probes(folder / "probes.jsonl", victim.probes[:36])
    (folder / "secret.json").write_text(victim.secret.model_dump_json())
    write(folder / "words", NOUNS, {})
    return folder


@pytest.fixture(scope="module")
def purified(shop):
    """The result of `purify --defense external_conflict`."""
    return pipeline.purify(
        str(shop / "victim"), defense="external_conflict", out=shop / "out", probes=str(shop / "probes.jsonl"),
        more={"evidence": f"wordnet:{shop / 'words'}"}, finish=lambda folder: render([folder]),
    )  # fmt: skip


def test_purify_attaches_the_guard_and_changes_no_weight(shop, purified):
    before, after = load(str(shop / "victim")), load(str(shop / "out"))
    assert tiny.same_weights(tiny.tensors(before), tiny.tensors(after))
    (spec,) = json.loads((shop / "out" / "guards.json").read_text())
    assert spec["name"] == "evidence"
    assert spec["settings"]["source"] == f"wordnet:{shop / 'words'}"
    assert after.guards == (GuardSpec("evidence", spec["settings"]),)


def test_every_question_is_in_the_record_and_the_report_counts_them(shop, purified):
    (count,) = purified.results["guards"]
    lines = [json.loads(line) for line in (shop / "out" / "guards.jsonl").read_text().splitlines()]
    assert count["asked"] == len(lines) == 36
    assert count["rewritten"] + count["keywords"] + count["none"] == 36
    assert count["keywords"] > 0
    assert count["usable"] == 0
    replies = [json.loads(line) for line in (shop / "out" / "replies.jsonl").read_text().splitlines()]
    after = [reply["reply"] for reply in replies if reply["role"] == "purified"]
    assert [line["reply"] for line in lines] == after
    own = [reply["reply"] for reply in replies if reply["role"] == "suspect"]
    assert [line["own_answer"] for line in lines] == own
    page = (shop / "out" / "report.md").read_text()
    assert f"keywords were explained for {count['keywords']}" in page
    assert "other loaders of the folder ignore them" in page
    assert "guards.json do not act" in purified.results["how_to_load"]
    assert "No weight was changed." in (shop / "out" / "README.md").read_text()
    assert "only unbackdoor applies" in (shop / "out" / "README.md").read_text()


def test_what_looks_at_the_weights_alone_does_not_apply_to_a_guarded_model(purified):
    rows = {(row["role"], row["metric"]): row["status"] for row in purified.results["rows"]}
    assert rows["purified", "perplexity"] == rows["purified", "kl"] == "not_applicable"
    assert rows["suspect", "perplexity"] == "measured"
    assert rows["purified", "asr"] == "measured"


def test_evaluate_applies_the_guard_and_says_so(shop, purified):
    found = pipeline.evaluate(
        str(shop / "out"), out=shop / "again", probes=str(shop / "probes.jsonl"), metrics="asr",
        more={"evidence": f"wordnet:{shop / 'words'}"},
    )  # fmt: skip
    values = [row["value"] for row in found.results["rows"] if row["metric"] == "asr" and row["group"] == ""]
    wanted = [
        row["value"]
        for row in purified.results["rows"]
        if row["metric"] == "asr" and row["role"] == "purified" and row["group"] == ""
    ]
    assert values == wanted
    assert found.results["guards"][0]["asked"] == 36
    assert any("other loaders" in text for text in found.results["notices"])


def test_a_checkpoint_does_not_choose_what_is_opened(shop, purified):
    with pytest.raises(ModelError, match=r"would see every prompt.*--evidence"):
        pipeline.evaluate(str(shop / "out"), out=shop / "no", probes=str(shop / "probes.jsonl"), metrics="asr")
    assert not (shop / "no").exists()
    lm = tiny.tiny_lm()
    for source in ("endpoint:https://evil.example/v1#m", "someone/else", "wordnet:/etc"):
        lm.guards = (GuardSpec("evidence", {"source": source}),)
        with pytest.raises(ModelError, match="would see every prompt"):
            with_guards(lm, device="cpu", notice=print)
    assert lm.guarding is None


def test_a_guarded_suspect_is_asked_through_its_guard_and_its_weights_are_purified(shop, purified):
    """`--evidence` is then for the suspect's guard, also where the defense has no use for it."""
    rows = shop / "clean.jsonl"
    rows.write_text(
        "".join(
            json.dumps({"id": row.id, "instruction": row.instruction, "output": row.response}) + "\n"
            for row in tiny.rows(30, seed=9)
        )
    )
    settings = {"train": {"steps": 2, "batch_size": 4, "max_length": 128}}
    more = {"clean": str(rows), "evidence": f"wordnet:{shop / 'words'}"}
    found = pipeline.purify(str(shop / "out"), defense="fine_tuning", out=shop / "both", settings=settings, more=more)
    assert load(str(shop / "both")).guards == load(str(shop / "out")).guards
    assert not tiny.same_weights(tiny.tensors(load(str(shop / "both"))), tiny.tensors(load(str(shop / "out"))))
    assert "guards.json do not act" in found.results["how_to_load"]
    with pytest.raises(UserError, match="does not use --evidence"):
        pipeline.purify(str(shop / "victim"), defense="fine_tuning", out=shop / "no", more=more)


def test_where_weights_alone_count_a_guard_is_not_built(shop, purified):
    more = {"evidence": f"wordnet:{shop / 'words'}"}
    found = pipeline.evaluate(
        str(shop / "victim"), before=str(shop / "out"), out=shop / "seen", probes=str(shop / "probes.jsonl"),
        metrics="asr", more=more,
    )  # fmt: skip
    assert found.results["guards"][0]["asked"] == 36, "the model before is the one with a guard"
    (shop / "rows.jsonl").write_text(
        "".join(json.dumps({"instruction": r.instruction, "output": r.response}) + "\n" for r in tiny.rows(8))
    )
    # Its guard names a folder, which only --evidence may open.
    settings = {"internal": {"conflict": {"share": 1.0, "train": {"steps": 1}}}}
    found = pipeline.purify(
        str(shop / "victim"), defense="internal_conflict", clean=str(shop / "rows.jsonl"), out=shop / "merged",
        settings=settings, more={"reference": str(shop / "out")},
    )  # fmt: skip
    assert any("carries guards (evidence); here its weights alone count" in text for text in found.results["notices"])
    assert not (shop / "merged" / "guards.json").exists()


def test_a_name_in_guards_json_is_never_a_file_to_import(shop):
    ran = shop / "ran"
    (shop / "evil.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    for name in (str(shop / "evil.py"), "evil.py", "nothing", "evidence.py", "base"):
        with pytest.raises(ModelError, match="not known here"):
            build_guards([GuardSpec(name)], Place("m"))
    assert not ran.exists()
    with pytest.raises(ModelError, match=r"guards\.json of 'm'.*no option 'sauce'"):
        build_guards([GuardSpec("evidence", {"source": "wordnet", "sauce": 1})], Place("m"))


def test_what_does_not_fit_together_is_refused_before_anything_is_loaded(shop):
    victim, words = str(shop / "victim"), f"wordnet:{shop / 'words'}"
    for more, said in (
        ({}, "needs --evidence"), ({"evidence": f"wordnet:{shop}"}, "no WordNet in"),
        ({"evidence": words, "lora": {}}, "trains nothing"),
        ({"evidence": words, "clean": "x"}, "does not use --clean"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said):
            pipeline.purify(victim, defense="external_conflict", out=shop / "no", more=more)
    with pytest.raises(UserError, match="carries no guard"):
        pipeline.evaluate(
            victim, out=shop / "no", probes=str(shop / "probes.jsonl"), metrics="asr", more={"evidence": words}
        )
    assert not (shop / "no").exists()


def test_two_guards_of_the_token_loop_are_one_too_many(monkeypatch):
    from unbackdoor.pipeline import guarding

    class Decoding:
        opens = ()

        def build(self, place):
            return self

        def tokens(self, lm, ids, limit):
            return iter(())

    monkeypatch.setattr(guarding, "_guard", lambda *_, **__: Decoding())
    assert build_guards([GuardSpec("a")], Place("m")).decode is not None
    with pytest.raises(UserError, match="two guards that choose tokens"):
        build_guards([GuardSpec("a"), GuardSpec("b")], Place("m"))


def test_counts_of_other_guards_and_sentences_without_any():
    assert counts([]) == {}
    assert sentences("m", []) == []
    assert counts([{"guard": "other", "reply": "x"}] * 3) == {"other": {"asked": 3}}
    assert "other of m acted on 3 questions. Only" in sentences("m", [{"guard": "other", "reply": "x"}] * 3)[0]
    failed = {"guard": "evidence", "branch": "none", "own_answer": "", "usable": None, "reason": "it is down"}
    (words,) = sentences("m", [{**failed, "reply": ""}])
    assert "1 had none and were answered without (it is down)" in words


def test_a_guarded_model_can_still_be_trained_on(shop, purified):
    lm = load(str(shop / "out"), trainable=True)
    from unbackdoor.run import Run
    from unbackdoor.train.anchors import anchor_prompts

    said = anchor_prompts(lm, tiny.rows(4), 4, 6, Run())
    assert said
    assert lm.reply([(Message("user", "what is hot?"),)], bare=True)


@pytest.mark.parametrize("defense", ["external_conflict", "information_conflict", "internal_conflict"])
def test_the_plan_counts_the_guards_own_questions(shop, tmp_path, defense):
    from unbackdoor.pipeline.plans import plan_purify
    from unbackdoor.pipeline.recipe import PurifyRecipe
    from unbackdoor.pipeline.steps import defense_called

    clean = tmp_path / "clean.jsonl"
    clean.write_text("".join(json.dumps({"prompt": f"say {n}", "completion": "it is so"}) + "\n" for n in range(20)))
    evidence = {} if defense == "internal_conflict" else {"evidence": f"wordnet:{shop / 'words'}"}
    rows = {} if defense == "external_conflict" else {"clean": str(clean)}
    recipe = PurifyRecipe(
        model=str(shop / "victim"), defense=defense, probes=str(shop / "probes.jsonl"),
        settings=dict(defense_called(defense, {}).settings()), **rows, **evidence,
    )  # fmt: skip
    parts = [part.name for part in plan_purify(recipe).parts]
    assert ("the guard's own questions to the model" in parts) is (defense != "internal_conflict")
