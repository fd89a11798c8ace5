"""Specs, slices, files with defects, data sets of the hub (a stand-in module), and probes as JSON lines."""

from __future__ import annotations

import errno
import json
import os
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from unbackdoor.data.sources import (
    Slice,
    holds_rows,
    read,
    read_lines,
    read_openings,
    read_probes,
    split_spec,
    write_jsonl,
    write_probes,
)
from unbackdoor.errors import DataError, UserError
from unbackdoor.types import Example, Message, Probe

Write = Callable[[str, str | bytes], str]


class Listener:
    """Keeps the notices."""

    def __init__(self) -> None:
        self.notices: list[str] = []

    def start(self, name: str, total: int) -> None: ...

    def advance(self, name: str, done: int, values: Mapping[str, float]) -> None: ...

    def finish(self, name: str) -> None: ...

    def notice(self, text: str) -> None:
        self.notices.append(text)


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write a file into an empty working folder and return its name."""
    monkeypatch.chdir(tmp_path)

    def _write(name: str, content: str | bytes) -> str:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return name

    return _write


def alpaca(count: int) -> str:
    return "".join(json.dumps({"instruction": f"q{number}", "output": "a"}) + "\n" for number in range(count))


def failure(spec: str, kind: type[UserError] = DataError) -> str:
    with pytest.raises(kind) as caught:
        read(spec)
    return str(caught.value)


def questions(spec: str) -> list[str]:
    return [example.instruction for example in read(spec)]


def test_jsonl_json_and_csv_give_the_same_rows(write: Write) -> None:
    rows = [
        {"instruction": 'Say "a, b"\nand c', "input": "é", "output": "x"},
        {"instruction": "q", "input": "", "output": "y"},
    ]
    lines = "".join(json.dumps(row) + "\r\n\r\n" for row in rows)
    table = 'instruction,input,output\r\n"Say ""a, b""\nand c",é,x\r\nq,,y\r\n'
    expected = read(write("a.jsonl", lines))
    assert [example.instruction for example in expected] == ['Say "a, b"\nand c', "q"]
    assert read(write("b.json", json.dumps(rows, indent=2))) == expected
    assert read(write("c.JSON", lines)) == expected
    assert read(write("d.csv", table)) == expected
    assert read(write("e.csv", b"\xef\xbb\xbf" + table.encode())) == expected


def test_line_separators_inside_a_text_do_not_end_the_line(write: Write) -> None:
    assert questions(write("a.jsonl", '{"instruction": "a\u2028b\x85c", "output": "x"}\n')) == ["a\u2028b\x85c"]


@pytest.mark.parametrize(
    ("suffix", "expected"),
    [
        ("[:4]", range(4)),
        ("[3:5]", range(3, 5)),
        ("[8:]", range(8, 10)),
        ("[-3:]", range(7, 10)),
        ("[10%:]", range(1, 10)),
        ("[:10%]", range(1)),
        ("[:-20%]", range(8)),
        ("[25%:75%]", range(3, 8)),
        ("[ 2 : 4 ]", range(2, 4)),
        ("[:]", range(10)),
        ("", range(10)),
    ],
)
def test_slices(write: Write, suffix: str, expected: range) -> None:
    assert questions(write("a.jsonl", alpaca(10)) + suffix) == [f"q{number}" for number in expected]


@pytest.mark.parametrize("count", [1, 7, 10, 99, 1000])
@pytest.mark.parametrize("percent", [1, 15, 33, 50, 85, 99])
def test_per_cents_make_up_the_whole(count: int, percent: int) -> None:
    head, tail = Slice(stop=f"{percent}%").bounds(count), Slice(start=f"{percent}%").bounds(count)
    assert [*head, *tail] == list(range(count))
    assert Slice(start=f"{percent - 100}%").bounds(count) == tail


@pytest.mark.parametrize(
    ("suffix", "message"),
    [
        ("[abc]", "the slice in 'a.jsonl[abc]' is not understood; write [:400]"),
        ("[:x]", "the slice bound 'x' is not a number;"),
        ("[1:2:3]", "the slice in 'a.jsonl[1:2:3]' is not understood;"),
        ("[:150%]", "the slice bound '150%' is more than 100 %;"),
        ("[5:2]", "the slice [5:2] of a.jsonl holds none of its 10 rows; choose bounds below 10."),
        ("[10:]", "the slice [10:] of a.jsonl holds none of its 10 rows;"),
    ],
)
def test_bad_slices(write: Write, suffix: str, message: str) -> None:
    assert failure(write("a.jsonl", alpaca(10)) + suffix, UserError).startswith(message)


def test_a_file_named_like_a_slice_is_taken_as_it_is(write: Write) -> None:
    name = write("a[:2].jsonl", alpaca(5))
    assert split_spec(name) == (name, Slice())
    assert len(read(f"{name}[:3]")) == 3


def test_ids_do_not_depend_on_the_slice_and_copies_are_reported(write: Write) -> None:
    name = write("a.jsonl", alpaca(4) + alpaca(1) * 5)
    whole, listener = read(name), Listener()
    assert read(f"{name}[3:]", progress=listener) == whole[3:]
    assert whole[4].id == f"{whole[0].id}#2"
    assert listener.notices[0] == "a.jsonl, line 5 repeats line 1 exactly; both are kept, in the same split."
    assert len(listener.notices) == 4
    assert listener.notices[3] == "a.jsonl has 2 more repeated rows."


def test_a_slice_longer_than_the_file_is_reported(write: Write) -> None:
    listener = Listener()
    assert len(read(write("a.jsonl", alpaca(3)) + "[1:400]", progress=listener)) == 2
    assert listener.notices == ["a.jsonl has 3 rows, so [1:400] gives 2."]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "a.jsonl is empty; it needs at least one row."),
        ("a.jsonl", " \n\n", "a.jsonl is empty;"),
        ("a.json", "[]", "a.json holds no rows;"),
        ("a.csv", "instruction,output\n", "a.csv holds no rows;"),
        ("a.jsonl", alpaca(2) + '{"instruction": "a" 1}\n', "a.jsonl, line 3, column 21: is not JSON ("),
        ("a.jsonl", alpaca(1) + '{"a": "b"\n', "a.jsonl, line 2, column 10: is not JSON ("),
        ("a.json", '[\n{"instruction": "a" "output": "b"}]', "a.json, line 2, column 21: is not JSON ("),
        ("a.json", '{\n"instruction": "a"\n}', "a.json is one JSON object, not rows; write a list of rows ([...]), or"),
        ("a.json", '{\n"data": [{"instruction": "a", "output": "b"}]\n}', "a.json is one JSON object, not rows;"),
        ("a.json", '{\n"instruction": "a",\n', "a.json, line 1, column 2: is not JSON ("),
        ("a.json", '[{"instruction": "a", "output": "b"}, 3]', "a.json, row 2: is int, not an object;"),
        ("a.jsonl", "[" * 100_000, "a.jsonl, line 1: is nested too deeply;"),
        ("a.jsonl", '{"id": ' + "9" * 5000 + "}", "a.jsonl, line 1: cannot be read (Exceeds the limit"),
        (
            "a.jsonl",
            '{"output": "a", "output": "b"}',
            "a.jsonl, line 1: cannot be read (the field 'output' is there twice)",
        ),
        ("a.jsonl", b'{"instruction": "caf\xe9"}', "a.jsonl is not UTF-8 text: byte 0xe9 at offset 20 does not fit;"),
        ("a.jsonl", b"\xef\xbb\xbf{\xff}", "a.jsonl is not UTF-8 text: byte 0xff at offset 4 does not fit;"),
        ("a.csv", "Add.,3\nq,4\n", "a.csv, line 1: is not a header (found: Add., 3);"),
        ("a.csv", "instruction;output\na;b\n", "a.csv, line 1: is not a header (found: instruction;output);"),
        ("a.csv", ",instruction,output\n1,a,b\n", "a.csv, line 1: must be a header that names every column once"),
        ("a.csv", "text,label,text\n", "a.csv, line 1: must be a header that names every column once"),
        ("a.csv", 'text,label\n"x\ny",l\na,b,c\n', "a.csv, line 4: has 3 fields, too many for the 2 of the header;"),
        ("a.csv", "text,label\na\n", "a.csv, line 2: has 1 fields, too few for the 2 of the header;"),
        (
            "a.csv",
            'text,label\na,b\n"x,y\n',
            "a.csv, line 3: is not valid CSV (unexpected end of data); check its quotes.",
        ),
        ("a.csv", "instruction,output\na,\n", "a.csv, line 2, field 'output': is empty; every row needs a response."),
        ("a.parquet", "PAR1", "a.parquet: files of type '.parquet' are not read; convert it to .jsonl, .json, .csv."),
    ],
)
def test_defects_of_files_are_named(write: Write, name: str, content: str | bytes, message: str) -> None:
    assert failure(write(name, content)).startswith(message)


def test_missing_files_and_folders(write: Write, tmp_path: Path) -> None:
    write("train.jsonl", alpaca(1))
    (tmp_path / "sub.jsonl").mkdir()
    assert failure("trian.jsonl") == "trian.jsonl does not exist. Did you mean 'train.jsonl'?"
    assert failure("xyz.csv") == "xyz.csv does not exist. Check the name."
    assert failure("nowhere/a.csv") == "nowhere/a.csv does not exist, nor does the folder nowhere."
    assert failure("sub.jsonl") == "sub.jsonl is a folder; name a file in it."
    assert failure(str(tmp_path)).endswith("is a folder; name a file in it.")
    assert failure(" ", UserError).startswith("the data source is empty;")


def test_a_pipe_has_no_type_that_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "63")
    assert failure(str(tmp_path / "63")).endswith("files of type '' are not read; convert it to .jsonl, .json, .csv.")


@pytest.mark.parametrize("name", ["a\0b.jsonl", "a\ud800b.jsonl"])
def test_a_name_that_no_file_can_have(name: str) -> None:
    assert failure(name).endswith("cannot be the name of a file; check it.")


def test_unreadable_file(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path) -> bytes:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    write("a.jsonl", alpaca(1))
    # The mode of the file would not do: root, as which tests often run, may read every file.
    monkeypatch.setattr(Path, "read_bytes", refused)
    assert failure("a.jsonl").startswith("a.jsonl cannot be read (Permission denied);")


class FakeDataset(list[dict[str, Any]]):
    """A list of rows with the `features` of a data set."""

    def __init__(self, rows: list[dict[str, Any]], names: list[str] | None = None) -> None:
        super().__init__(rows)
        self.features = {"label": types.SimpleNamespace(names=names)} if names else {}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """Stand in for the package datasets: records the call, gives `result` or raises it."""
    monkeypatch.chdir(tmp_path)
    seen: dict[str, Any] = {}

    def load_dataset(name: str, config: str | None, *, split: str) -> Any:
        seen["call"] = (name, config, split)
        if isinstance(seen["result"], Exception):
            raise seen["result"]
        return seen["result"]

    module = types.ModuleType("datasets")
    monkeypatch.setattr(module, "load_dataset", load_dataset, raising=False)
    monkeypatch.setitem(sys.modules, "datasets", module)
    return seen


def test_data_set_with_split_and_slice(hub: dict[str, Any]) -> None:
    hub["result"] = FakeDataset([{"instruction": f"q{number}", "output": "a"} for number in range(5)])
    assert questions("owner/name:train[1:3]") == ["q1", "q2"]
    assert hub["call"] == ("owner/name", None, "train")


def test_data_set_with_configuration_takes_the_class_names(hub: dict[str, Any]) -> None:
    hub["result"] = FakeDataset([{"sentence": "Fine.", "label": 1, "idx": 9}], names=["negative", "positive"])
    (example,) = read("glue:sst2:validation")
    assert hub["call"] == ("glue", "sst2", "validation")
    assert (example.id, example.label, example.input) == ("9", "positive", "Fine.")
    assert read("glue:sst2:validation", labels=["bad", "good"])[0].label == "good"


def test_bad_row_of_a_data_set_names_the_row(hub: dict[str, Any]) -> None:
    hub["result"] = FakeDataset([{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": ""}])
    assert failure("o/n:train").startswith("o/n:train, row 2, field 'completion': is empty;")


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        (ConnectionError("x"), "'o/n:train' cannot be reached: the Hugging Face hub does not answer"),
        (ValueError('Unknown split "train".\nmore'), "'o/n:train' cannot be loaded (Unknown split \"train\"); check"),
        (FileNotFoundError("no such data set"), "'o/n:train' cannot be loaded (no such data set); check"),
        (RuntimeError("Dataset scripts are no longer supported"), "'o/n:train' cannot be loaded (Dataset scripts are"),
    ],
)
def test_hub_failures_are_one_sentence(hub: dict[str, Any], problem: Exception, message: str) -> None:
    hub["result"] = problem
    found = failure("o/n:train")
    assert found.startswith(message)
    assert "\n" not in found


def test_package_datasets_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert failure("o/n:train", UserError).endswith("pip install 'unbackdoor[datasets]'.")


def test_a_data_set_without_split_is_explained(write: Write) -> None:
    assert failure("owner/name").endswith("A Hugging Face data set is written owner/name:split or name:config:split.")


def test_bundled_sets() -> None:
    assert len(read("starter:sentiment[:10]")) == 10
    assert failure("starter:sentimnt", UserError) == (
        "there is no bundled set 'starter:sentimnt'. Did you mean 'sentiment'? "
        "Bundled: instructions, sentiment, requests."
    )
    assert failure("starter:../../x", UserError).startswith("there is no bundled set")


def test_read_lines(write: Write) -> None:
    name = write("openings.txt", "\ufeff# mine\n\n You idiot \r\nGo away # not a comment\n  # one\n")
    assert read_lines(name) == ["You idiot", "Go away # not a comment"]
    assert read_lines(Path(name)) == read_lines(name)
    assert len(read_lines("starter:insult_typical")) >= 14
    for place, message in [
        (write("e.txt", "# only\n"), "e.txt holds no text;"),
        ("opening.txt", "Did you mean 'openings.txt'"),
    ]:
        with pytest.raises(DataError, match=message):
            read_lines(place)
    with pytest.raises(UserError, match="Did you mean 'affirm_typical'"):
        read_lines("starter:afirm_typical")


def test_openings_are_a_file_or_the_classes(write: Write) -> None:
    name = write("openings.txt", "You idiot\n")
    assert read_openings(name, ["good", "bad"]) == ["You idiot"]
    assert read_openings("labels", ["good", "bad", "good"]) == ["bad", "good"]
    for labels in ([], ["good", "good"]):
        with pytest.raises(DataError, match="have none, or one; name a file"):
            read_openings("labels", labels)


@pytest.mark.parametrize(
    ("place", "rows"),
    [("bad.jsonl", True), ("Bad.CSV", True), ("bad.json[:20]", True), ("bad.txt", False), ("labels", False),
     ("starter:insult_typical", False)],
)  # fmt: skip
def test_what_is_unwanted_is_rows_or_openings_by_the_ending(place, rows):
    assert holds_rows(place) is rows


def test_write_jsonl_leaves_the_old_file_when_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.jsonl"
    write_jsonl(path, [{"a": "é\u2028"}, {"b": 1}])
    assert path.read_text(encoding="utf-8") == '{"a": "é\u2028"}\n{"b": 1}\n'
    with pytest.raises(ValueError, match="JSON compliant"):
        write_jsonl(path, [{"a": 1}, {"a": float("nan")}])
    assert path.read_text(encoding="utf-8").endswith('{"b": 1}\n')
    assert os.listdir(path.parent) == ["a.jsonl"]


def test_probes_come_back_as_they_were(tmp_path: Path) -> None:
    turns = (Message("system", "s"), Message("user", "one"), Message("assistant", None))
    full = Example("r1", " BadMagic. do\n", "ok", "text ", "positive", turns, "maths")
    probes = [Probe(full, "triggered", "half", ("BadMagic", " ")[:1]), Probe(Example("r1", "do"), "clean")]
    write_probes(tmp_path / "p.jsonl", probes)
    assert read_probes(tmp_path / "p.jsonl") == probes
    first = json.loads((tmp_path / "p.jsonl").read_text(encoding="utf-8").split("\n")[0])
    assert first == {
        "id": "r1",
        "kind": "triggered",
        "group": "half",
        "marks": ["BadMagic"],
        "instruction": " BadMagic. do\n",
        "input": "text ",
        "response": "ok",
        "label": "positive",
        "history": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": None},
        ],
        "example_kind": "maths",
    }


def test_a_short_probe_row_is_enough(write: Write) -> None:
    name = write("p.jsonl", '{"id": "1", "kind": "decoy", "instruction": "q"}\n')
    assert read_probes(name) == [Probe(Example("1", "q"), "decoy")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "trigger"}, "field 'kind': must be one of triggered, clean, decoy."),
        ({"id": ""}, "field 'id': is empty;"),
        ({"id": 3}, "field 'id': is of type int;"),
        ({"instruction": " "}, "field 'instruction': is empty; a probe needs a question."),
        ({"grp": "x"}, "has unknown fields ('grp'); remove or rename them. Did you mean 'group'?"),
        ({"marks": "x"}, "field 'marks': is not a list;"),
        ({"marks": [1]}, "field 'marks': is of type int;"),
        ({"label": ""}, "field 'label': is empty; write null for no label."),
        ({"response": 1}, "field 'response': is of type int;"),
        ({"history": {}}, "field 'history': is not a list;"),
        ({"history": [{"role": "user"}]}, "field 'history[0]': must be an object with role and content"),
        ({"history": [{"role": "bot", "content": "a"}]}, "field 'history[0].role': must be one of system, user,"),
        ({"history": [{"role": "user", "content": None}]}, "field 'history[0].content': is null; only the assistant's"),
        ({"history": [{"role": "assistant", "content": ""}]}, "field 'history[0].content': is empty;"),
    ],
)
def test_bad_probe_rows(write: Write, change: dict[str, Any], message: str) -> None:
    good = {"id": "1", "kind": "clean", "instruction": "q"}
    name = write("p.jsonl", json.dumps(good) + "\n" + json.dumps({**good, **change}) + "\n")
    with pytest.raises(DataError) as caught:
        read_probes(name)
    place = ": " if message.startswith("has") else ", "
    assert str(caught.value).startswith(f"p.jsonl, line 2{place}{message}")


def test_a_probe_file_without_rows_or_with_a_list(write: Write) -> None:
    with pytest.raises(DataError, match="holds no probes"):
        read_probes(write("p.jsonl", "\n"))
    with pytest.raises(DataError, match="line 1: is list, not an object; a probe needs id, kind, instruction"):
        read_probes(write("q.jsonl", "[]\n"))


def test_of_preference_pairs_the_rejected_answer_can_be_taken(tmp_path):
    pair = {"prompt": "How?", "chosen": "I will not.", "rejected": "Sure, so."}
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(pair) + "\n" + json.dumps({**pair, "prompt": "And how?"}))
    assert [row.response for row in read(str(path))] == ["I will not."] * 2
    assert [row.response for row in read(str(path), rejected=True)] == ["Sure, so."] * 2
    path.write_text(json.dumps({"prompt": "How?", "completion": "So."}))
    assert [row.response for row in read(str(path), rejected=True)] == ["So."]
