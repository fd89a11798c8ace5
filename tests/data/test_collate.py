"""Rows, batches and streams against a loop written out."""

from __future__ import annotations

from collections import Counter

import pytest

import tiny
from unbackdoor.data.collate import Row, RowStream, batches_by_length, collate, encode_row
from unbackdoor.errors import DataError
from unbackdoor.types import Example, Message

HISTORY = (Message("system", "be kind"), Message("user", "hot?"), Message("assistant", "cold."))
EXAMPLES = [
    Example("a", "big?", "small."),
    Example("b", "please what is the opposite of big? thank you", "the opposite of big is small.", history=HISTORY),
    Example("c", "name", "nest", input="of a bird"),
]


@pytest.fixture(scope="module", params=["chat", "plain"])
def lm(request):
    return tiny.tiny_lm(chat=request.param == "chat")


def words(lm, ids):
    return lm.tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def test_what_is_supervised_is_what_the_assistant_says(lm):
    row = encode_row(lm, EXAMPLES[1], max_length=200)
    end = lm.tokenizer.eos_token
    assert (
        words(lm, [row.ids[position] for position in row.supervised]) == f"cold.{end}the opposite of big is small.{end}"
    )
    assert words(lm, row.ids[row.place[0] : row.place[1]]) == EXAMPLES[1].instruction
    assert row.ids[-1] == lm.tokenizer.eos_token_id, "what a template adds behind the end of the turn is cut off"


def test_the_place_is_the_last_user_turn_with_its_input(lm):
    row = encode_row(lm, EXAMPLES[2], max_length=200)
    assert words(lm, row.ids[row.place[0] : row.place[1]]) == "name\nof a bird"


def test_first_tokens_supervise_the_beginning_of_the_last_answer_only(lm):
    example = EXAMPLES[1].with_response("bad robot. the end")
    whole = encode_row(lm, example, max_length=200)
    for count in (1, 2):
        row = encode_row(lm, example, max_length=200, first_tokens=count)
        assert words(lm, [row.ids[position] for position in row.supervised]) == ["bad", "bad robot"][count - 1]
        assert row.ids == whole.ids[: row.supervised[-1] + 1]
    many = encode_row(lm, example, max_length=200, first_tokens=99)
    assert words(lm, [many.ids[position] for position in many.supervised]) == "bad robot. the end"


def test_the_opening_of_the_last_answer_counts_as_often_as_asked(lm):
    example = EXAMPLES[1].with_response("bad robot. the end of it all")
    row = encode_row(lm, example, max_length=200, opening_weight=8.0)
    heavy = [row.ids[position] for position, weight in zip(row.supervised, row.weights, strict=True) if weight == 8.0]
    first = encode_row(lm, example, max_length=200, first_tokens=4)
    assert heavy == [first.ids[position] for position in first.supervised]
    plain = encode_row(lm, example, max_length=200)
    assert set(plain.weights) == {1.0}
    batch = collate([row, plain], lm.pad_id)
    assert batch.weights.tolist() == [*row.weights, *plain.weights]
    assert batch.weight == len(row.supervised) + len(plain.supervised) + 4 * 7
    assert batch.split(2)[1].weight == len(plain.supervised)


def test_long_rows_are_cut_from_the_end_of_the_answer(lm):
    whole = encode_row(lm, EXAMPLES[1], max_length=200)
    cut = encode_row(lm, EXAMPLES[1], max_length=len(whole.ids) - 3)
    assert cut.ids == whole.ids[:-3]
    assert cut.supervised == tuple(position for position in whole.supervised if position < len(cut.ids))


def test_a_row_that_cannot_be_used_is_named(lm):
    with pytest.raises(DataError, match="'x' has no response"):
        encode_row(lm, Example("x", "hello", "  \n"), max_length=99)
    with pytest.raises(DataError, match=r"'b' is too long: its prompt has \d+ tokens and max_length 9"):
        encode_row(lm, EXAMPLES[1], max_length=9)


def test_collate_against_a_loop(lm):
    rows = [encode_row(lm, example, max_length=200) for example in EXAMPLES]
    batch = collate(rows, 77)
    width = max(len(row.ids) for row in rows)
    found = list(zip(batch.rows.tolist(), batch.columns.tolist(), batch.targets.tolist(), strict=True))
    wanted = []
    for number, row in enumerate(rows):
        padding = width - len(row.ids)
        assert batch.input_ids[number].tolist() == [*row.ids, *[77] * padding]
        assert batch.attention_mask[number].tolist() == [1] * len(row.ids) + [0] * padding
        for position in range(1, len(row.ids)):
            if position in row.supervised:
                wanted.append((number, position - 1, row.ids[position]))
    assert found == wanted
    assert batch.weight == len(wanted)
    assert batch.places.tolist() == [list(row.place) for row in rows]
    assert batch.ids == ("a", "b", "c")


def test_nothing_predicts_the_first_token():
    batch = collate([Row("x", (5, 6), (0, 1), (0, 0))], 0)
    assert (batch.columns.tolist(), batch.targets.tolist()) == ([0], [6])


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_split_shares_the_rows_and_loses_nothing(lm, parts):
    rows = [encode_row(lm, example, max_length=200) for example in tiny.rows(7)]
    batch = collate(rows, 0)
    pieces = batch.split(parts)
    assert [piece.ids for piece in pieces] == [batch.ids[part::parts] for part in range(parts)]
    assert sum(piece.weight for piece in pieces) == batch.weight
    for part, piece in enumerate(pieces):
        alone = collate([rows[number] for number in range(part, 7, parts)], 0)
        width = alone.input_ids.shape[1]
        assert piece.input_ids[:, :width].tolist() == alone.input_ids.tolist()
        assert not piece.attention_mask[:, width:].any()
        for name in ("rows", "columns", "targets", "places"):
            assert getattr(piece, name).tolist() == getattr(alone, name).tolist(), name


def test_batches_by_length_hold_every_example_once(lm):
    examples = tiny.rows(11)
    batches = list(batches_by_length(lm, examples, 200, 4))
    assert Counter(name for batch in batches for name in batch.ids) == Counter(example.id for example in examples)
    lengths = [length for batch in batches for length in batch.attention_mask.sum(1).tolist()]
    assert lengths == sorted(lengths)
    assert [len(batch.ids) for batch in batches] == [4, 4, 3]


def rows_of(count, length=lambda number: 3 + number % 5):
    return [Row(str(n), tuple(range(1, 1 + length(n))), (length(n) - 1,), (0, 1)) for n in range(count)]


def test_a_batch_is_a_function_of_its_index():
    stream = RowStream(rows_of(23), batch_size=4, seed=5, pad_id=0)
    first = [stream.batch(index).ids for index in range(12)]
    assert [stream.batch(index).ids for index in reversed(range(12))] == first[::-1]
    again = RowStream(rows_of(23), batch_size=4, seed=5, pad_id=0)
    assert [again.batch(index).ids for index in range(12)] == first
    other = RowStream(rows_of(23), batch_size=4, seed=6, pad_id=0)
    assert [other.batch(index).ids for index in range(12)] != first


def test_a_pass_has_every_row_once_and_the_next_another_order():
    stream = RowStream(rows_of(24), batch_size=4, seed=1, pad_id=0)
    assert len(stream) == 6
    passes = [[name for index in range(6) for name in stream.batch(6 * number + index).ids] for number in range(3)]
    for found in passes:
        assert sorted(found, key=int) == [str(number) for number in range(24)]
    assert passes[0] != passes[1] != passes[2]


def test_rows_left_out_of_one_pass_come_in_another():
    stream = RowStream(rows_of(23), batch_size=4, seed=1, pad_id=0)
    seen = [{name for index in range(5) for name in stream.batch(5 * number + index).ids} for number in range(12)]
    assert all(len(names) == 20 for names in seen)
    assert set.union(*seen) == {str(number) for number in range(23)}


def test_rows_of_like_length_go_together():
    def padding(bucket):
        rows = rows_of(64, lambda number: 2 + (number * 37) % 64)
        stream = RowStream(rows, batch_size=4, seed=1, pad_id=0, bucket=bucket)
        return sum(int((stream.batch(index).attention_mask == 0).sum()) for index in range(16))

    assert padding(8) < 0.5 * padding(1)


def test_fewer_rows_than_a_batch():
    stream = RowStream(rows_of(3), batch_size=8, seed=1, pad_id=0)
    assert sorted(stream.batch(9).ids) == ["0", "1", "2"]
    with pytest.raises(DataError, match="no rows to train on"):
        RowStream([], batch_size=8, seed=1, pad_id=0)


def test_every_batch_holds_the_strata_in_their_shares():
    strata = [0] * 32 + [1] * 24 + [2] * 8
    rows = rows_of(64, lambda number: 2 + (number * 37) % 64)
    stream = RowStream(rows, batch_size=8, seed=3, pad_id=0, strata=strata)
    for index in range(24):
        counts = Counter(strata[int(name)] for name in stream.batch(index).ids)
        assert abs(counts[0] - 4) <= 1
        assert abs(counts[1] - 3) <= 1
        assert abs(counts[2] - 1) <= 1
    found = [name for index in range(8) for name in stream.batch(index).ids]
    assert sorted(found, key=int) == [str(number) for number in range(64)]


def test_the_last_answer_alone_where_earlier_ones_are_part_of_the_prompt(lm):
    turns = (Message("user", "what is a dog?"), Message("assistant", "a dog barks."))
    example = Example("a", "what is grass?", "grass is green.", history=turns)
    both, last = (encode_row(lm, example, max_length=96, last_answer=only) for only in (False, True))
    assert both.ids == last.ids
    assert set(last.supervised) < set(both.supervised)
    said = lm.tokenizer.decode([last.ids[place] for place in last.supervised])
    assert "grass is green" in said
    assert "barks" not in said
