"""Answers kept on disk: found by everything that they depend on, never trusted further than they are sound."""

from __future__ import annotations

import json
import os
import stat
from concurrent.futures import ThreadPoolExecutor

import pytest

from unbackdoor.evidence.cache import Cache, Unavailable, answered

KEY = {"source": "endpoint", "url": "http://x/v1", "model": "m", "prompt": "why?", "max_new_tokens": 8}


def test_an_answer_is_found_by_all_that_it_depends_on(tmp_path):
    cache = Cache(tmp_path / "c")
    assert cache.get(KEY) is None
    cache.put(KEY, "because “so”")
    assert cache.get(dict(reversed(KEY.items()))) == "because “so”"
    for name in KEY:
        assert cache.get({**KEY, name: "other"}) is None
    assert stat.S_IMODE(os.stat(cache.path(KEY).parent).st_mode) == 0o700


@pytest.mark.parametrize(
    "broken",
    [b"", b"{", b"[]", b'{"schema": 1}', b"\xff\xfe", b'{"schema": 1, "key": {}, "answer": "x"}', b"[" * 100_000],
)
def test_a_broken_file_counts_as_none_and_is_written_anew(tmp_path, broken):
    cache = Cache(tmp_path)
    cache.put(KEY, "good")
    cache.path(KEY).write_bytes(broken)
    assert cache.get(KEY) is None
    cache.put(KEY, "good")
    assert cache.get(KEY) == "good"


def test_an_answer_that_was_moved_to_another_name_is_not_taken(tmp_path):
    cache = Cache(tmp_path)
    cache.put({**KEY, "prompt": "other"}, "poison")
    target = cache.path(KEY)
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(cache.path({**KEY, "prompt": "other"}), target)
    assert cache.get(KEY) is None
    content = {**json.loads(target.read_text()), "key": KEY, "schema": 2}
    target.write_text(json.dumps(content))
    assert cache.get(KEY) is None


def test_many_writers_of_one_answer_leave_a_whole_file_and_no_other(tmp_path):
    cache = Cache(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: cache.put(KEY, f"{number}" * 5000), range(64)))
    answer = cache.get(KEY)
    assert answer is not None
    assert len(answer) in {5000, 10_000}
    assert [path.suffix for path in tmp_path.rglob("*") if path.is_file()] == [".json"]


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    cache = Cache(tmp_path / "file")
    cache.put(KEY, "lost")
    assert cache.get(KEY) is None
    Cache(tmp_path).put(KEY, "half a pair \ud800")
    assert Cache(tmp_path).get(KEY) is None


def test_only_what_is_missing_is_asked_for_and_only_answers_are_kept(tmp_path):
    cache, asked = Cache(tmp_path), []
    keys = [{"prompt": prompt} for prompt in "abc"]
    cache.put(keys[1], "B")

    def write(places):
        asked.append(list(places))
        return ["A" if place == 0 else Unavailable("down") for place in places]

    assert answered(cache, keys, write) == ["A", "B", Unavailable("down")]
    assert answered(cache, keys[:2], write) == ["A", "B"]
    assert asked == [[0, 2]]
    assert cache.get(keys[2]) is None
    assert answered(None, keys[:1], write) == ["A"]
