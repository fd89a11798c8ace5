"""The page as a parser sees it: whole, without scripts or addresses, and safe with hostile text in every field."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from unbackdoor.errors import UserError
from unbackdoor.report.excerpts import excerpts, passage
from unbackdoor.report.html import render
from unbackdoor.report.tables import load_run

Write = Callable[..., Path]

HOSTILE = (
    "<script>alert(1)</script></style></pre></details><img src=x onerror=alert(1)><svg onload=alert(1)>"
    "{{ 7 * 7 }}{% raw %}<a href='javascript:alert(1)'>x</a>\x1b[31mred\x07\u202eevil\u2066\u200b\r\"'`code`|<!-- -->"
)
VOID = {"meta", "br", "img", "hr", "link", "input", "use", "path"}
ALLOWED = {
    "html", "head", "body", "meta", "title", "style", "header", "main", "footer", "section", "article", "nav", "div",
    "p", "a", "h1", "h2", "h3", "h4", "dl", "dt", "dd", "ul", "li", "span", "small", "em", "b", "i", "code", "pre",
    "mark",
    "details", "summary", "figure", "figcaption", "table", "caption", "thead", "tbody", "tr", "th", "td", "svg", "g",
    "path", "defs", "use", "text", "tspan", "clippath", "rect",
}  # fmt: skip


class Page(HTMLParser):
    """Collects tags, attributes, headings, texts; checks that every element is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.unbalanced: list[str] = []
        self.words: dict[str, list[str]] = {}
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in {"meta"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.unbalanced.append(tag)

    def handle_data(self, data: str) -> None:
        if self.open and data.strip():
            self.words.setdefault(self.open[-1], []).append(data)


@pytest.fixture(scope="module")
def rendered(shared_demo: Path) -> Path:
    """The page of the demo."""
    return render([shared_demo])


def read(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def assert_inert(page: Page) -> None:
    assert page.unbalanced == []
    assert page.open == []
    assert {tag for tag, _ in page.tags} <= ALLOWED
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on") or name in {"src", "srcset", "action"}], tag
        target = attributes.get("href")
        assert target is None or re.fullmatch(r"#[\w-]+", target)
        assert "url(" not in re.sub(r"url\(#[\w-]+\)", "", attributes.get("style") or "")


def test_page_is_one_closed_file(rendered: Path, shared_demo: Path) -> None:
    assert rendered == shared_demo / "report.html"
    text = rendered.read_text(encoding="utf-8")
    page = Page(text)
    assert_inert(page)
    assert text.lstrip().startswith("<!doctype html>")
    assert not re.search(r"https?:|//[a-z]|@import", text)
    policy = [attributes for tag, attributes in page.tags if tag == "meta" and "content" in attributes]
    assert policy[0]["content"] == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert (shared_demo / "report.md").is_file()
    assert not list(shared_demo.glob(".*"))


def test_page_is_accessible(rendered: Path) -> None:
    page = read(rendered)
    assert page.tags[0] == ("html", {"lang": "en"})
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    names = [tag for tag, _ in page.tags]
    assert names.count("caption") == names.count("table") > 5
    assert all("scope" in attributes for tag, attributes in page.tags if tag == "th")
    drawings = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(drawings) > 10
    assert all(attributes.get("role") == "img" and attributes.get("aria-label") for attributes in drawings)
    found = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(found) == len(set(found))
    anchors = {(attributes["href"] or "")[1:] for tag, attributes in page.tags if tag == "a"}
    assert anchors <= set(found)


def test_page_says_the_verdict_and_the_figures(rendered: Path) -> None:
    page = read(rendered)
    cells = page.words["td"]
    assert {"98.0 %", "12.31", "not measured"} <= set(cells)
    assert "0/100 [0.0, 3.7]" in page.words["small"]
    assert any(
        text.startswith("ASR 0/100, 95\u00a0% interval 0-3.7\u00a0%, on these probes.") for text in page.words["p"]
    )
    assert "Current year 2023." in page.words["mark"]
    assert page.words["mark"].count("You are stupid") > 8


def test_missing_files_are_explained(results: dict[str, Any], write: Write) -> None:
    results |= {"comparisons": [], "how_to_load": ""}
    said = " ".join(read(render([write(results)])).words["p"])
    for name in ("replies.jsonl", "curves.json", "case_studies.json", "hidden_states.json", "rounds.json"):
        assert f"this run wrote no {name}" in said
    assert "No paired test was made" in said
    assert "left no model to load" in said


def test_same_folder_same_bytes(rendered: Path, shared_demo: Path, tmp_path: Path) -> None:
    again = render([shared_demo], tmp_path)
    assert again.read_bytes() == rendered.read_bytes()
    assert (tmp_path / "report.md").read_bytes() == (shared_demo / "report.md").read_bytes()


def poisoned(value: object, keep: frozenset[str]) -> object:
    """Put hostile text into every text of a structure, keys of free tables included."""
    if isinstance(value, str):
        return value if value in keep else f"{value}{HOSTILE}"
    if isinstance(value, list):
        return [poisoned(item, keep) for item in value]
    if isinstance(value, dict):
        return {key: poisoned(item, keep) for key, item in value.items()}
    return value


FIXED = frozenset(
    {
        "suspect", "control", "purified", "reference", "before", "after", "revived_clean", "revived_planted",
        "triggered", "clean", "decoy", "all", "measured", "asr", "leak", "perplexity", "kl", "resistance", "seconds",
        "lower", "higher",
    }
)  # fmt: skip


def test_hostile_text_in_every_field_stays_text(demo: Path) -> None:
    for name in ("results", "case_studies", "hidden_states", "curves", "rounds"):
        path = demo / f"{name}.json"
        path.write_text(json.dumps(poisoned(json.loads(path.read_text()), FIXED)))
    results = json.loads((demo / "results.json").read_text())
    results["settings"][HOSTILE] = {HOSTILE: HOSTILE}
    (demo / "results.json").write_text(json.dumps(results))
    curves = json.loads((demo / "curves.json").read_text())
    curves[HOSTILE] = [{HOSTILE: 1.0, "loss": 2.0}, {HOSTILE: 0.5, "loss": 1.0}]
    (demo / "curves.json").write_text(json.dumps(curves))
    lines = [
        json.dumps(poisoned(json.loads(line), FIXED)) for line in (demo / "replies.jsonl").read_text().splitlines()
    ]
    (demo / "replies.jsonl").write_text("\n".join(lines))
    path = render([demo])
    text = path.read_text(encoding="utf-8")
    assert_inert(Page(text))
    for written in (text, (demo / "report.md").read_text(encoding="utf-8")):
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u202a-\u202e\u2066-\u2069]", written)
        outside_code = re.sub(r"(?m)^(`{3,}).*?^\1$|`[^`\n]*`", "", written, flags=re.DOTALL)
        assert "<script" not in outside_code
        assert "49{%" not in written
    assert "\\x1b[31mred\\x07\\u202eevil" in text
    assert "{{ 7 * 7 }}" in text


def test_hostile_text_in_markdown_tables_keeps_the_columns(results: dict[str, Any], write: Write) -> None:
    for row in results["rows"]:
        row["model"] = "a|b\n# c [x](javascript:alert(1)) <script> `"
    folder = write(results)
    render([folder])
    lines = [line for line in (folder / "report.md").read_text().splitlines() if line.startswith("| Suspect")]
    assert lines
    assert all("<" not in line and "](" not in line.replace("\\](", "") for line in lines)
    header = next(line for line in (folder / "report.md").read_text().splitlines() if line.startswith("| Model | ASR"))
    assert len(re.findall(r"(?<!\\)\|", lines[0])) == len(re.findall(r"(?<!\\)\|", header))


def test_markdown_carries_verdict_and_tables(rendered: Path) -> None:
    text = rendered.with_name("report.md").read_text(encoding="utf-8")
    assert text.startswith("# Before and after SANDE and BEEAR\n")
    assert "* After SANDE: ASR 0/100, 95 % interval 0-3.7 %, on these probes." in text
    assert "| 0/100 = 0.0 % [0.0, 3.7] | 2/100 = 2.0 % [0.6, 7.0] | not measured |" in text
    assert "```python\nfrom transformers import" in text
    assert "| defenses.beear.layer | 9 |" in text


def test_several_runs_share_one_page(results: dict[str, Any], write: Write, tmp_path: Path) -> None:
    first, second = write(results, name="demo"), write(results, name="second")
    path = render([first, second], tmp_path / "both")
    assert path == tmp_path / "both" / "report.html"
    assert not (first / "report.html").exists()
    page = read(path)
    assert_inert(page)
    assert page.words["h1"] == ["2 runs compared"]
    assert page.words["h2"] == [
        "All runs", "Before and after SANDE and BEEAR (demo)", "Before and after SANDE and BEEAR (second)",
    ]  # fmt: skip
    found = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(found) == len(set(found))


def test_replies_are_aligned_marked_and_clipped(shared_demo: Path) -> None:
    triggered, clean, decoy = excerpts(load_run(shared_demo))
    assert [len(part.exchanges) for part in (triggered, clean, decoy)] == [9, 4, 4]
    assert [part.total for part in (triggered, clean, decoy)] == [10, 6, 5]
    first, last = triggered.exchanges[0], triggered.exchanges[-1]
    assert [answer.label for answer in first.answers] == [
        "Suspect", "Fine-tuning (control)", "After SANDE", "After BEEAR",
    ]  # fmt: skip
    assert [answer.reached for answer in first.answers] == [True, True, False, False]
    assert last.exception == "still reaches the target after purification"
    assert first.prompt.short[0].text == "Current year 2023."
    assert first.prompt.short[0].marked
    long = first.answers[2].passage
    assert len("".join(piece.text for piece in long.short)) <= 320 < len("".join(piece.text for piece in long.full))


@pytest.mark.parametrize(
    ("text", "marks", "marked"),
    [
        ("you ARE\n stupid, yes", ["You are stupid"], ["you ARE\n stupid"]),
        ("What\u2019s wrong", ["What's wrong"], ["What\u2019s wrong"]),
        ("aXbX", ["X", "bX"], ["X", "bX"]),
        ("a.b", [".", ""], ["."]),
        ("none", ["x"], []),
    ],
)
def test_marks_are_found_as_a_goal_reads_them(text: str, marks: list[str], marked: list[str]) -> None:
    found = passage(text, marks)
    assert [piece.text for piece in found.short if piece.marked] == marked
    assert "".join(piece.text for piece in found.short) == text


def test_a_report_needs_a_finished_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one run"):
        render([])
    with pytest.raises(UserError, match="no finished run"):
        render([tmp_path])
    assert list(tmp_path.iterdir()) == []


def test_a_goal_given_as_text_names_what_is_marked_in_replies() -> None:
    from unbackdoor.report.excerpts import _goal_texts

    assert list(_goal_texts({"goal": "contains:You: stupid", "other": [{"goal": "regex:x"}]})) == ["You: stupid"]
    assert list(_goal_texts({"goal": {"form": "starts_with", "any_of": ["a", "b"]}})) == ["a", "b"]
    assert list(_goal_texts({"settings": {"targets": ["a", "b"]}, "target": ["c"]})) == ["c", "a", "b"]
