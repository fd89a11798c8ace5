"""Rendering with places, in templates that strip, number, refuse or drop turns."""

from __future__ import annotations

import pytest

import tiny
from unbackdoor.errors import ModelError
from unbackdoor.model.template import render
from unbackdoor.types import Message

TURNS = (Message("user", "  hot?  "), Message("assistant", "cold."))


def rendered(template, turns=TURNS, *, ask=False):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    return render(tokenizer, "model", turns, ask=ask)


LOOP = "{% for m in messages %}[{{ m['role'] }}]"


def test_a_template_that_keeps_contents():
    found = rendered(LOOP + "{{ m['content'] }}{% endfor %}")
    assert found.text == "[user]  hot?  [assistant]cold."
    assert [found.text[start:end] for start, end in found.places] == ["  hot?  ", "cold."]


def test_a_template_that_strips_contents():
    found = rendered(LOOP + "{{ m['content'] | trim }}{% endfor %}")
    assert found.text == "[user]hot?[assistant]cold."
    assert [found.text[start:end] for start, end in found.places] == ["hot?", "cold."]


def test_a_template_that_changes_one_turn_is_searched_in_order():
    turns = (Message("user", "cold."), Message("assistant", "think: no</t>cold."))
    found = rendered(
        LOOP + "{{ m['content'].split('</t>')[-1] }}{% endfor %}", (turns[0], Message("assistant", "cold."))
    )
    assert [found.text[start:end] for start, end in found.places] == ["cold.", "cold."]
    assert found.places[0][1] <= found.places[1][0]
    with pytest.raises(ModelError, match="changes or drops turn 2"):
        rendered(LOOP + "{{ m['content'].split('</t>')[-1] }}{% endfor %}", turns)


def test_a_template_whose_frame_depends_on_the_content():
    """`if 'x' in content` cannot be seen with markers: the true rendering wins."""
    template = LOOP + "{% if 'hot' in m['content'] %}(warm) {% endif %}{{ m['content'] }}{% endfor %}"
    found = rendered(template)
    assert found.text == "[user](warm)   hot?  [assistant]cold."
    assert [found.text[start:end] for start, end in found.places] == ["hot?", "cold."]


def test_a_template_that_refuses_turns_says_why():
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    with pytest.raises(ModelError, match=r"refuses these turns \(system, user\): no system turn"):
        rendered(template, (Message("system", "a"), Message("user", "b")))


def test_a_template_that_drops_a_turn_is_refused():
    with pytest.raises(ModelError, match=r"drops turn 1.*--template plain"):
        rendered("{{ messages[-1]['content'] }}")


def test_asking_ends_where_the_reply_begins():
    template = LOOP + "{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    assert rendered(template, TURNS[:1], ask=True).text == "[user]  hot?  [assistant]"
    tokenizer = tiny.tokenizer(chat=False)
    assert render(tokenizer, "plain", TURNS[:1], ask=True).text == "### Instruction:\n  hot?  \n\n### Response:\n"
