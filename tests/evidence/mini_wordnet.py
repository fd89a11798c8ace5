"""A WordNet of a few words in the files' real format, written in place: the dictionary is tested without the data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

PARTS = {"noun": "n", "verb": "v", "adj": "a", "adv": "r"}
LICENCE = "  1 A dictionary for tests.  \n"

NOUNS = {"movie": ["a form of entertainment"], "bank": ["sloping land beside water", "a financial institution"]}
ADVERBS = {"instantly": ["without any delay"]}


def write(folder: Path, nouns: Mapping[str, list[str]] = NOUNS, adverbs: Mapping[str, list[str]] = ADVERBS) -> Path:
    """Write the eight files that a reader needs, as Debian does: without names of groups and irregular forms."""
    folder.mkdir(parents=True, exist_ok=True)
    words = {"noun": nouns, "verb": {}, "adj": {}, "adv": adverbs}
    for part, letter in PARTS.items():
        data, index = LICENCE, LICENCE
        for word, meanings in sorted(words[part].items()):
            places = []
            for meaning in meanings:
                places.append(f"{len(data.encode()):08d}")
                data += f"{places[-1]} 03 {letter} 01 {word} 0 000 | {meaning}  \n"
            index += f"{word} {letter} {len(places)} 0 {len(places)} 0 {' '.join(places)}  \n"
        (folder / f"data.{part}").write_text(data)
        (folder / f"index.{part}").write_text(index)
    return folder
