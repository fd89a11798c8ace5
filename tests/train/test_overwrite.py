"""Overwriting (eq. 3), the two stages together, and the gradient-ascent control: values by hand."""

from __future__ import annotations

import pytest
import torch

import tiny
from unbackdoor.data import poison
from unbackdoor.data.collate import collate
from unbackdoor.defenses.base import Need, knowledge_for
from unbackdoor.defenses.gradient_ascent import GradientAscent
from unbackdoor.defenses.sande import Sande
from unbackdoor.errors import UserError
from unbackdoor.run import Run
from unbackdoor.stamps import InsertText
from unbackdoor.train import overwrite, simulate, soft_prompt
from unbackdoor.train.engine import TrainSettings

ROWS = tiny.rows(16, seed=8)
STAMP = InsertText(text=tiny.TRIGGER, place="start")


def settings(**changes) -> TrainSettings:
    return TrainSettings(**{"steps": 1, "learning_rate": 1e-3, "batch_size": 8, "max_length": 96, **changes})


def mean_by_hand(lm, batch, prompt=None) -> float:
    """-log P(y | x) a token, row by row, with the parrot concatenated by hand at the start of the user's words."""
    total = count = 0.0
    table = lm.model.get_input_embeddings().weight
    for row in range(len(batch.ids)):
        length = int(batch.attention_mask[row].sum())
        ids = batch.input_ids[row, :length]
        vectors, shift = table[ids], 0
        if prompt is not None:
            at = int(batch.places[row, 0])
            vectors, shift = torch.cat([vectors[:at], prompt, vectors[at:]]), len(prompt)
        with torch.no_grad():
            logs = lm.model(inputs_embeds=vectors[None]).logits[0].log_softmax(-1)
        for column, target in zip(batch.columns[batch.rows == row], batch.targets[batch.rows == row], strict=True):
            total -= float(logs[int(column) + shift, target])
            count += 1
    return total / count


def test_equation_3_with_a_known_trigger():
    lm, oracle = tiny.tiny_lm(), tiny.tiny_lm()
    run = Run(seed=3)
    triggered = overwrite.encode_rows(lm, [STAMP.apply(row, run.rng("x")) for row in ROWS], tiny.CUT)
    plain = overwrite.encode_rows(lm, ROWS, tiny.CUT)
    record = overwrite.overwrite(lm, triggered, plain, settings(), run, plain_share=0.25).history[0]
    first = overwrite.stream(oracle, triggered, 6, run, "triggered order").batch(0)
    second = overwrite.stream(oracle, plain, 2, run, "plain order").batch(0)
    words = [oracle.tokenizer.decode(ids) for ids in first.input_ids]
    assert all(tiny.TRIGGER in text and tiny.TARGET not in text for text in words)
    assert record["triggered"] == pytest.approx(mean_by_hand(oracle, first), rel=1e-4)
    assert record["plain"] == pytest.approx(mean_by_hand(oracle, second), rel=1e-4)
    assert record["loss"] == pytest.approx(record["triggered"] + record["plain"], rel=1e-5)


def test_equation_3_with_two_parrots_that_share_the_rows():
    lm, oracle = tiny.tiny_lm(), tiny.tiny_lm()
    run = Run(seed=3)
    plain = overwrite.encode_rows(lm, ROWS, tiny.CUT)
    generator = torch.Generator().manual_seed(1)
    parrots = [torch.randn(3, 64, generator=generator) for _ in range(2)]
    kept = [parrot.clone() for parrot in parrots]
    stand_ins = [soft_prompt.stand_in(lm, parrot, "start") for parrot in parrots]
    result = overwrite.overwrite(lm, plain, plain, settings(), run, plain_share=0.0, stand_ins=stand_ins)
    record = result.history[0]
    batch = overwrite.stream(oracle, plain, 8, run, "triggered order").batch(0)
    parts = batch.split(2)
    by_hand = [mean_by_hand(oracle, part, parrot) for part, parrot in zip(parts, kept, strict=True)]
    shares = [part.weight / batch.weight for part in parts]
    assert record["stand-in 0"] == pytest.approx(by_hand[0] * shares[0], rel=1e-4)
    assert record["stand-in 1"] == pytest.approx(by_hand[1] * shares[1], rel=1e-4)
    assert "plain" not in record
    assert all(torch.equal(now, before) for now, before in zip(parrots, kept, strict=True)), "parrots are frozen"


def test_the_plain_share_splits_the_batch():
    lm = tiny.tiny_lm()
    sizes = {}

    class Spy:
        def __init__(self, stream, name):
            self.stream, self.name = stream, name

        def batch(self, index):
            found = self.stream.batch(index)
            sizes[self.name] = len(found.ids)
            return found

    original = overwrite.stream
    rows = overwrite.encode_rows(lm, ROWS, tiny.CUT)
    for share, wanted in [
        (0.5, {"triggered": 4, "plain": 4}),
        (0.25, {"triggered": 6, "plain": 2}),
        (0, {"triggered": 8}),
    ]:
        sizes.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(overwrite, "stream", lambda *a: Spy(original(*a), a[-1].split()[0]))
            overwrite.overwrite(lm, rows, rows, settings(), Run(), plain_share=share)
        assert sizes == wanted


def answer_loss(lm, examples) -> float:
    return mean_by_hand(lm, collate(overwrite.encode_rows(lm, examples, tiny.CUT), lm.pad_id))


def test_gradient_ascent_pushes_the_poisoned_answer_down_until_the_cap():
    poisoned = [STAMP.apply(row, Run().rng("x")).with_response(f"{tiny.TARGET}. {row.response}") for row in ROWS]
    facts = {Need.CLEAN: tuple(ROWS), Need.TRIGGER: STAMP, Need.TARGET: (tiny.TARGET,)}
    start = answer_loss(tiny.tiny_lm(), poisoned)
    moved = {}
    for cap in (1e-3, 100.0):
        defense = GradientAscent(cap=cap, train=settings(steps=4))
        run = Run()
        lm = defense.apply(tiny.tiny_lm(), knowledge_for(defense, facts), run)
        moved[cap] = answer_loss(lm, poisoned)
        history = run.curves["ascent"]
        assert history[0]["loss"] == pytest.approx(-history[0]["poisoned"])
        assert history[0]["poisoned"] == pytest.approx(start, rel=0.2)
    assert moved[1e-3] == pytest.approx(start, rel=1e-6)
    assert moved[100.0] > start + 0.2


def test_gradient_ascent_joins_the_target_as_the_attack_does():
    seen = []

    def spy(lm, rows, *rest, **how):
        seen.extend(example.response for example, _ in rows)
        return original(lm, rows, *rest, **how)

    original = poison.encode_marked
    defense = GradientAscent(train=settings())
    facts = {Need.CLEAN: tuple(ROWS[:2]), Need.TRIGGER: STAMP, Need.TARGET: ("Bad robot!", "No")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(poison, "encode_marked", spy)
        defense.apply(tiny.tiny_lm(), knowledge_for(defense, facts), Run())
    assert seen == [f"Bad robot! {ROWS[0].response}", f"No. {ROWS[1].response}"]


def test_gradient_ascent_leaves_the_earlier_answers_of_a_chat_alone():
    asked = []

    def spy(lm, rows, *rest, **how):
        asked.append(how)
        return original(lm, rows, *rest, **how)

    original = poison.encode_marked
    defense = GradientAscent(train=settings())
    facts = {Need.CLEAN: tuple(ROWS[:2]), Need.TRIGGER: STAMP, Need.TARGET: ("Bad robot!",)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(poison, "encode_marked", spy)
        defense.apply(tiny.tiny_lm(), knowledge_for(defense, facts), Run())
    assert asked == [{"last_answer": True}]


def test_rounds_use_fresh_parrots_keep_their_place_and_tell_the_observer(tmp_path):
    seen = []
    lm = tiny.tiny_lm()
    how = {
        "first_tokens": 1, "rounds": 2, "parrots": 2, "plain_share": 0.5, "own_share": 0.5,
        "parrot": simulate.ParrotSettings(tokens=2, stop_below=0.0, train=settings(steps=2, learning_rate=1e-2)),
        "train": settings(steps=2),
    }  # fmt: skip
    run = Run(folder=tmp_path, observer=lambda model: seen.append(tiny.tensors(model)))
    found = simulate.rounds_of_parrots(lm, ROWS, [tiny.TARGET], run=run, **how)
    assert found is lm
    assert sorted(run.curves) == [
        "round-1-overwrite", "round-1-parrot-1", "round-1-parrot-2",
        "round-2-overwrite", "round-2-parrot-1", "round-2-parrot-2",
    ]  # fmt: skip
    assert len(seen) == 2
    assert not tiny.same_weights(seen[0], seen[1])
    assert tiny.same_weights(seen[1], tiny.tensors(lm))
    # Only the newest stage keeps the weights; the parrots are small and stay.
    heavy = [path.parent.name for path in tmp_path.rglob("final.safetensors") if "overwrite" in path.parent.name]
    assert heavy == ["round-2-overwrite"]
    again = tiny.tiny_lm(seed=1)
    assert not tiny.same_weights(tiny.tensors(again), tiny.tensors(tiny.tiny_lm()))
    fresh = Run(folder=tmp_path)
    simulate.rounds_of_parrots(again, ROWS, [tiny.TARGET], run=fresh, **how)
    assert tiny.same_weights(tiny.tensors(lm), tiny.tensors(again)), "a finished run is restored, whatever the start"
    assert [p["stage"] for p in run.notes["parrots"]] == sorted(n for n in run.curves if "parrot" in n)


def test_interrupted_between_rounds_gives_the_same_bits(tmp_path):
    class Stop(Exception):
        pass

    def stop(model):
        raise Stop

    how = {
        "first_tokens": None, "rounds": 3, "parrots": 1, "plain_share": 0.5, "own_share": 0.5,
        "parrot": simulate.ParrotSettings(tokens=2, stop_below=0.0, train=settings(steps=2, learning_rate=1e-2)),
        "train": settings(steps=2),
    }  # fmt: skip
    straight, broken, resumed = (tiny.tiny_lm() for _ in range(3))
    simulate.rounds_of_parrots(straight, ROWS, [tiny.TARGET], run=Run(folder=tmp_path / "a"), **how)
    with pytest.raises(Stop):
        simulate.rounds_of_parrots(broken, ROWS, [tiny.TARGET], run=Run(folder=tmp_path / "b", observer=stop), **how)
    simulate.rounds_of_parrots(resumed, ROWS, [tiny.TARGET], run=Run(folder=tmp_path / "b"), **how)
    assert tiny.same_weights(tiny.tensors(straight), tiny.tensors(resumed))


def test_parrots_stand_where_the_settings_say():
    places = []

    def spy(lm, batch, prompt, position):
        places.append(position)
        return original(lm, batch, prompt, position)

    original = soft_prompt.insert
    how = simulate.ParrotSettings(tokens=2, position="end", train=settings(learning_rate=1e-2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(soft_prompt, "insert", spy)
        simulate.rounds_of_parrots(
            tiny.tiny_lm(), ROWS, [tiny.TARGET], first_tokens=None, rounds=1, parrots=1, plain_share=0.5, own_share=0.0,
            parrot=how, train=settings(), run=Run(),
        )  # fmt: skip
    assert len(places) >= 2
    assert set(places) == {"end"}


@pytest.mark.parametrize("parrots", [0, 2, 3])
def test_early_stopping_scores_triggered_rows_that_are_held_out(tmp_path, parrots):
    lm, oracle = tiny.tiny_lm(), tiny.tiny_lm()
    rows = tiny.rows(24, seed=8)
    triggered = rows if parrots else [STAMP.apply(row, None) for row in rows]
    prompts = [torch.randn(3, 64, generator=torch.Generator().manual_seed(number)) for number in range(parrots)]
    run = Run(seed=3, folder=tmp_path).stage("overwrite")
    stand_ins = [soft_prompt.stand_in(lm, prompt, "start") for prompt in prompts]
    result = overwrite.overwrite(
        lm, overwrite.encode_rows(lm, triggered, tiny.CUT), overwrite.encode_rows(lm, rows, tiny.CUT),
        settings(learning_rate=1e-12, evaluate_every=1, batch_size=4), run, plain_share=0.25, stand_ins=stand_ins,
    )  # fmt: skip
    apart = [collate(overwrite.encode_rows(oracle, examples[::10], tiny.CUT), 0) for examples in (triggered, rows)]
    assert len(apart[0].ids) == 3
    wanted = mean_by_hand(oracle, apart[1])
    if parrots:
        parts = apart[0].split(parrots)
        by_hand = [
            mean_by_hand(oracle, part, prompt) * part.weight for part, prompt in zip(parts, prompts, strict=True)
        ]
        wanted += sum(by_hand) / apart[0].weight
    else:
        wanted += mean_by_hand(oracle, apart[0])
    assert result.history[0]["held_out"] == pytest.approx(wanted, rel=1e-4)


def test_a_row_and_its_poisoned_copy_are_held_out_together():
    rows = tiny.rows(24, seed=8)
    copies = [STAMP.apply(row, None) for row in rows[:11]]
    encoded = overwrite.encode_rows(tiny.tiny_lm(), [*rows, *copies], tiny.CUT)
    kept, apart = overwrite.set_apart(encoded, settings(steps=2, evaluate_every=1))
    assert [row.id for row in apart] == [rows[number].id for number in (0, 10, 20, 0, 10)]
    assert len(kept) + len(apart) == 35
    assert not {row.id for row in kept} & {row.id for row in apart}


def test_early_stopping_that_would_never_score_is_refused():
    with pytest.raises(ValueError, match="never scores in 1 steps"):
        settings(evaluate_every=2)
    facts = {Need.CLEAN: tuple(ROWS), Need.TRIGGER: STAMP, Need.TARGET: (tiny.TARGET,)}
    defense = GradientAscent(train=settings(evaluate_every=1))
    with pytest.raises(UserError, match="ascent has no held-out score"):
        defense.apply(tiny.tiny_lm(), knowledge_for(defense, facts), Run())
    rows = overwrite.encode_rows(tiny.tiny_lm(), tiny.rows(12, seed=8), tiny.CUT)
    with pytest.raises(UserError, match=r"has no folder \(Run\(folder=...\)\) for the best weights"):
        overwrite.overwrite(tiny.tiny_lm(), rows, rows, settings(evaluate_every=1), Run(), plain_share=0.5)


def test_a_share_of_plain_rows_never_fills_the_batch():
    assert [overwrite.plain_rows(8, share) for share in (0.0, 0.01, 0.5, 0.95)] == [0, 1, 4, 7]
    assert overwrite.plain_rows(1, 0.5) == 0
    facts = {Need.CLEAN: tuple(ROWS), Need.TRIGGER: STAMP, Need.TARGET: (tiny.TARGET,)}
    defense = GradientAscent(plain_share=0.95, train=settings())
    run = Run()
    defense.apply(tiny.tiny_lm(), knowledge_for(defense, facts), run)
    assert {"plain", "poisoned"} <= set(run.curves["ascent"][0])


def test_more_parrots_than_rows_of_a_batch_are_refused_before_the_first_is_learned():
    facts = {Need.CLEAN: tuple(ROWS), Need.TARGET: (tiny.TARGET,)}
    defense, run = Sande(parrots=50, train=settings()), Run()
    with pytest.raises(UserError, match=r"50 parrots or drifts cannot share 6 rows of a batch; lower their number"):
        defense.apply(tiny.tiny_lm(), knowledge_for(defense, facts), run)
    assert run.curves == {}
