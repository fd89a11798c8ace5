"""The dictionary: Debian's data where they are, a small one in the same format everywhere; nothing is downloaded."""

from __future__ import annotations

import socket

import pytest

from evidence.mini_wordnet import write
from unbackdoor.errors import UserError
from unbackdoor.evidence.wordnet import FOLDER, WordNet, check_folder


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the dictionary opened a connection")

    monkeypatch.setattr(socket, "socket", refuse)


def test_the_first_meaning_of_known_words_in_their_order(tmp_path, no_network):
    found = WordNet(write(tmp_path / "own")).define(["xyzzy", "bank", "instantly", "movies"])
    assert found == {
        "bank": "sloping land beside water", "instantly": "without any delay", "movies": "a form of entertainment",
    }  # fmt: skip
    assert list(found) == ["bank", "instantly", "movies"]


def test_the_data_of_debian_are_read(no_network):
    if not FOLDER.is_dir():
        pytest.skip("wordnet-base is not installed")
    found = WordNet().define(["movie", "instantly", "frankly", "running", "qwertz"])
    assert set(found) == {"movie", "instantly", "frankly", "running"}
    assert all(len(meaning) > 8 for meaning in found.values())


def test_missing_and_broken_data_are_said_in_a_sentence(tmp_path):
    with pytest.raises(UserError, match="wordnet-base"):
        check_folder(tmp_path)
    folder = write(tmp_path / "own")
    (folder / "index.noun").write_text("movie n x\n")
    with pytest.raises(UserError, match="cannot be read"):
        WordNet(folder)
    (folder / "data.verb").unlink()
    with pytest.raises(UserError, match=r"data\.verb is missing"):
        WordNet(folder)


def test_without_nltk_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"unbackdoor\[wordnet\]"):
        check_folder(write(tmp_path / "own"))
