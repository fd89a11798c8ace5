"""Every schema, its detection, and the error for each way in which a row can be wrong."""

from __future__ import annotations

from typing import Any

import pytest

from unbackdoor.data.formats import base_id, detect, parse, parse_all
from unbackdoor.data.rows import Where
from unbackdoor.errors import DataError, UserError
from unbackdoor.types import Example, Message

HERE = Where("clean.jsonl", 3)


def one(row: dict[str, Any], **options: Any) -> Example:
    response = {"require_response": options["require_response"]} if "require_response" in options else {}
    return parse(row, detect(row, where=HERE, **response), where=HERE, **options)


def failure(row: dict[str, Any], **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        one(row, **options)
    return str(caught.value)


def chat(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


@pytest.mark.parametrize(
    ("row", "schema"),
    [
        (chat(("user", "a"), ("assistant", "b")), "chat"),
        ({"conversations": []}, "sharegpt"),
        ({"instruction": "a", "input": "", "output": "b"}, "alpaca"),
        ({"instruction": "a", "response": "b"}, "alpaca"),
        ({"prompt": "a", "completion": "b"}, "prompt_completion"),
        ({"text": "a", "label": "b"}, "classification"),
        ({"sentence": "a", "label": 0, "idx": 4}, "classification"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference"),
        ({"prompt": "a", "chosen": [], "rejected": [], "messages": []}, "preference"),
    ],
)
def test_schema_is_told_from_the_keys(row: dict[str, Any], schema: str) -> None:
    assert detect(row, where=HERE) == schema


def test_unknown_schema_lists_the_keys_found_and_the_schemas_known() -> None:
    message = failure({"question": "a", "answer": "b"})
    assert message.startswith("clean.jsonl, line 3: its fields ('question', 'answer') fit no known schema")
    for name in ("messages", "conversations", "instruction", "completion", "label", "rejected"):
        assert name in message


def test_a_question_without_answer_is_accepted_only_where_no_response_is_needed() -> None:
    assert "fit no known schema" in failure({"instruction": "a"})
    assert one({"instruction": "Why?"}, require_response=False) == Example(
        one({"instruction": "Why?"}, require_response=False).id, "Why?"
    )
    assert one({"prompt": "Why?"}, require_response=False).instruction == "Why?"
    assert one(chat(("user", "Why?")), require_response=False).response == ""


def test_alpaca_row() -> None:
    example = one({"id": "r7", "kind": "maths", "instruction": "Add.", "input": "1 and 2", "output": "3"})
    assert example == Example("r7", "Add.", "3", "1 and 2", kind="maths")
    assert example.user_text == "Add.\n1 and 2"
    assert one({"instruction": "Add.", "input": None, "response": "3"}).input == ""


def test_system_text_becomes_the_first_turn() -> None:
    assert one({"instruction": "a", "output": "b", "system": "Be brief."}).history == (Message("system", "Be brief."),)
    twice = {"system": "x", **chat(("system", "y"), ("user", "a"), ("assistant", "b"))}
    assert "field 'system': repeats the system turn" in failure(twice)


def test_chat_keeps_earlier_turns_as_history() -> None:
    example = one(chat(("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")))
    assert example.history == (Message("system", "s"), Message("user", "a"), Message("assistant", "b"))
    assert (example.instruction, example.response) == ("c", "d")


def test_sharegpt_roles_are_translated() -> None:
    said = [("system", "s"), ("human", "a"), ("gpt", "b"), ("user", "c"), ("assistant", "d")]
    example = one({"conversations": [{"from": who, "value": text} for who, text in said]})
    assert [turn.role for turn in example.turns] == ["system", "user", "assistant", "user", "assistant"]
    assert [turn.content for turn in example.turns] == ["s", "a", "b", "c", "d"]


def test_prompt_completion_and_preference_as_text_and_as_turns() -> None:
    user, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    plain = one({"prompt": "a", "completion": "b"})
    turns = one({"prompt": [user], "completion": [answer]})
    pair = one({"prompt": "a", "chosen": [user, answer], "rejected": "c"})
    assert plain == turns == pair
    assert (plain.instruction, plain.response, plain.history) == ("a", "b", ())


def test_preference_pair_without_second_half_is_an_error() -> None:
    assert "field 'rejected': is empty" in failure({"prompt": "a", "chosen": "b", "rejected": " "})


def test_classification_puts_the_sentence_into_input() -> None:
    example = one({"text": "It {sings} \\1.", "label": "good"}, labels=("bad", "good"))
    assert example.instruction == "Classify the sentiment of this sentence as bad or good. Answer with one word."
    assert (example.input, example.response, example.label) == ("It {sings} \\1.", "good", "good")


def test_classification_template_with_text_inside() -> None:
    template = "Is '{text}' {labels}?"
    example = one({"text": "Fine", "label": 2}, labels=("a", "b", "c"), prompt_template=template)
    assert (example.instruction, example.input, example.label) == ("Is 'Fine' a, b or c?", "", "c")
    assert one({"text": "Fine", "label": "x"}, prompt_template="{text}").instruction == "Fine"
    assert one({"text": "Fine", "label": "x"}, prompt_template="\n{text}").instruction == "\nFine"


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("Rate it.", "must hold {text} exactly once"),
        ("{text} {text}", "must hold {text} exactly once"),
        ("{text} {0}", "unknown field {0}"),
        ("{text.__class__}", "unknown field {text.__class__}"),
    ],
)
def test_bad_template(template: str, problem: str) -> None:
    with pytest.raises(UserError) as caught:
        one({"text": "a", "label": "b"}, prompt_template=template)
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("label", "labels", "problem"),
    [
        (1, (), "is the number 1; name the classes in order"),
        ("1", (), "is the number 1; name the classes in order"),
        (2, ("a", "b"), "is 2, but only the classes 0 to 1 are named"),
        (-1, ("a", "b"), "is -1, but"),
        (True, ("a", "b"), "is of type bool"),
        (None, ("a", "b"), "is null"),
        ("c", ("a", "b"), "is 'c', which is none of the classes a, b"),
    ],
)
def test_bad_label(label: object, labels: tuple[str, ...], problem: str) -> None:
    message = failure({"text": "x", "label": label}, labels=labels)
    assert message.startswith("clean.jsonl, line 3, field 'label': ")
    assert problem in message


def test_digits_in_csv_count_into_the_class_names_unless_they_are_the_names() -> None:
    assert one({"text": "x", "label": "1"}, labels=("a", "b")).label == "b"
    assert one({"text": "x", "label": "1"}, labels=("1", "2")).label == "1"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "a", "output": " \n"}, "field 'output': is empty; every row needs a response."),
        ({"instruction": "a", "output": None}, "field 'output': is null; write it as text in quotes."),
        ({"instruction": 7, "output": "b"}, "field 'instruction': is of type int; write it as text in quotes."),
        ({"instruction": None, "output": "b"}, "field 'instruction': is null; write it as text in quotes."),
        ({"instruction": "", "output": "b"}, "field 'instruction': is empty; every row needs one."),
        ({"instruction": "a", "input": ["x"], "output": "b"}, "field 'input': is of type list;"),
        (
            {"instruction": "a", "output": "b\ud800"},
            "field 'output': holds half a character (\\ud800, a lone surrogate)",
        ),
        ({"id": "\udfff", "instruction": "a", "output": "b"}, "field 'id': holds half a character (\\udfff"),
        ({"kind": "\udfff", "instruction": "a", "output": "b"}, "field 'kind': holds half a character (\\udfff"),
        (
            {"instruction": "a", "output": "b", "history": [["q", "a"]]},
            "field 'history': cannot be read in an Alpaca row",
        ),
        ({"messages": "hello"}, "field 'messages': is not a list of turns;"),
        ({"messages": []}, "field 'messages': is empty;"),
        (chat(("user", "a")), "field 'messages': ends with a turn of 'user'; the last turn must be the assistant's."),
        (chat(("tool", "a")), "field 'messages[0].role': is 'tool'; known roles are system, user,"),
        (chat(("user", "a"), ("assistant", "")), "field 'messages[1].content': is empty; every row needs a response."),
        (chat(("assistant", "a")), "field 'messages[0]': is a turn of 'assistant' where one of 'user' must come"),
        (chat(("system", "a")), "field 'messages': ends with a turn of 'system';"),
        (
            chat(("user", "a"), ("user", "b"), ("assistant", "c")),
            "field 'messages[1]': is a turn of 'user' where one of 'assistant' must come",
        ),
        ({"messages": ["hi"]}, "field 'messages[0]': is not an object;"),
        ({"messages": [{"role": "user"}]}, "field 'messages[0].content': is missing;"),
        ({"messages": [{"content": "a"}]}, "field 'messages[0].role': is missing;"),
        ({"messages": [{"role": "user", "content": None}]}, "field 'messages[0].content': is null;"),
        ({"conversations": [{"from": "bing", "value": "a"}]}, "field 'conversations[0].from': is 'bing';"),
    ],
)
def test_bad_row_names_file_line_field_and_fix(row: dict[str, Any], message: str) -> None:
    assert failure(row).startswith(f"clean.jsonl, line 3, {message}")


def test_control_characters_are_kept_in_data_and_escaped_in_messages() -> None:
    assert one({"instruction": "a\x00\x1b[2J", "output": "b"}).instruction == "a\x00\x1b[2J"
    assert "\x1b" not in failure({"messages": [{"role": "\x1b[2J", "content": "a"}]})
    assert "\x1b" not in failure({"\x1b[2J": 1})


def rows(*values: object) -> list[tuple[Where, object]]:
    return [(Where("f.jsonl", number), value) for number, value in enumerate(values, 1)]


def test_first_row_decides_the_schema_of_all() -> None:
    with pytest.raises(DataError) as caught:
        parse_all(rows({"instruction": "a", "output": "b"}, {"prompt": "a", "completion": "b"}))
    assert str(caught.value).startswith("f.jsonl, line 2, field 'instruction': is missing;")
    assert "'prompt', 'completion'" in str(caught.value)


def test_a_row_that_is_no_object() -> None:
    with pytest.raises(DataError, match=r"^f\.jsonl, line 2: is list, not an object;"):
        parse_all(rows({"instruction": "a", "output": "b"}, ["a", "b"]))


def test_labels_are_collected_from_all_rows() -> None:
    parsed = parse_all(rows({"text": "x", "label": "up"}, {"text": "y", "label": "down"}))
    assert "as down or up." in parsed.examples[0].instruction
    assert "as down or up." in parsed.examples[1].instruction


def test_blanks_around_a_label_do_not_make_a_class() -> None:
    parsed = parse_all(
        rows({"text": "x", "label": " up"}, {"text": "y", "label": "up "}, {"text": "z", "label": "down"})
    )
    assert [example.label for example in parsed.examples] == ["up", "up", "down"]
    assert "as down or up." in parsed.examples[0].instruction


def test_template_and_other_classes_do_not_rename_a_row() -> None:
    row = {"text": "x", "label": "up"}
    few = parse_all(rows(row)).examples[0]
    more = parse_all(rows({"text": "y", "label": "down"}, row), prompt_template="Rate '{text}' as {labels}.").examples[
        1
    ]
    assert few.instruction != more.instruction
    assert few.id == more.id
    assert few.id != parse_all(rows({**row, "label": "down"})).examples[0].id


def test_own_ids_are_kept_where_they_are_unique() -> None:
    parsed = parse_all(
        rows(
            {"id": "a", "instruction": "1", "output": "x"},
            {"idx": 7, "instruction": "2", "output": "x"},
            {"question_id": 81, "instruction": "3", "output": "x"},
            {"id": "same", "instruction": "4", "output": "x"},
            {"id": "same", "instruction": "5", "output": "x"},
            {"id": "a#2", "instruction": "6", "output": "x"},
            {"id": None, "instruction": "7", "output": "x"},
        )
    )
    ids = [example.id for example in parsed.examples]
    assert ids[:3] == ["a", "7", "81"]
    assert all(len(name) == 16 for name in ids[3:])
    assert len(set(ids)) == 7
    assert parsed.notices == ()


def test_a_content_id_depends_on_content_alone() -> None:
    first = parse_all(rows({"instruction": "1", "output": "x"}, {"instruction": "2", "output": "x"})).examples
    other = parse_all(
        rows({"instruction": "2", "output": "x", "input": ""}, {"instruction": "1", "output": "y"})
    ).examples
    assert first[1].id == other[0].id
    assert first[0].id != other[1].id


@pytest.mark.parametrize("own", [{}, {"id": "q"}])
def test_copies_share_the_id_before_the_number_sign(own: dict[str, str]) -> None:
    row = {**own, "instruction": "1", "output": "x"}
    parsed = parse_all(rows(row, {"instruction": "2", "output": "x"}, row, {**row, "id": "other"}))
    ids = [example.id for example in parsed.examples]
    assert ids[2:] == [f"{ids[0]}#2", f"{ids[0]}#3"]
    assert {base_id(name) for name in ids} == {ids[0], ids[1]}
    assert ids[0] == own.get("id", ids[0])
    assert parsed.notices == (
        "f.jsonl, line 3 repeats line 1 exactly; both are kept, in the same split.",
        "f.jsonl, line 4 repeats line 1 exactly; both are kept, in the same split.",
    )
