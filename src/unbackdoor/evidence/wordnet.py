"""WordNet as a dictionary: what a word means, offline, through nltk's reader.

The data are those of Debian's `wordnet-base` at /usr/share/wordnet, or a folder that the person names; nothing is ever
downloaded. Of a word with several meanings the first is taken, which WordNet orders by how frequent they are.
"""

from __future__ import annotations

import io
import threading
import warnings
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unbackdoor.errors import UserError
from unbackdoor.model.quarantine import printable

FOLDER = Path("/usr/share/wordnet")
_NEEDED = tuple(f"{kind}.{part}" for kind in ("index", "data") for part in ("noun", "verb", "adj", "adv"))
_LEXICOGRAPHER_FILES = 45


class WordNet:
    """Definitions of English words."""

    def __init__(self, folder: Path = FOLDER) -> None:
        """Read the index (about two seconds).

        Raises:
            UserError: If the extra or the data are missing, or the data cannot be read.
        """
        check_folder(folder)
        streams: list[Any] = []
        # The reader leaves its files open for as long as it is there, and after an error, too.
        weakref.finalize(self, _close, streams)
        self._reader = _open(folder, streams)
        # The reader moves about in files that it keeps open.
        self._lock = threading.Lock()

    def define(self, words: Sequence[str]) -> dict[str, str]:
        """Return word -> definition of those of the words that are known, in their order."""
        found: dict[str, str] = {}
        with self._lock:
            for word in words:
                meanings = self._reader.synsets(word)
                if meanings:
                    found[word] = str(meanings[0].definition())
        return found


def check_folder(folder: Path) -> None:
    """Look whether WordNet can be read from a folder.

    Raises:
        UserError: If the extra or a file is missing.
    """
    from importlib.util import find_spec

    if find_spec("nltk") is None:
        raise UserError("the dictionary needs the package nltk; pip install 'unbackdoor[wordnet]'.")
    missing = [name for name in _NEEDED if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"there is no WordNet in '{printable(str(folder))}' ({missing[0]} is missing); install Debian's package "
            "wordnet-base, or name a folder that has its files: wordnet:FOLDER."
        )


def _close(streams: Sequence[Any]) -> None:
    for stream in streams:
        stream.close()


def _open(folder: Path, streams: list[Any]) -> Any:
    """Return nltk's reader of a folder; what it opens is added to `streams`."""
    import nltk
    from nltk.corpus.reader.wordnet import WordNetCorpusReader, WordNetError

    class Reader(WordNetCorpusReader):  # type: ignore[misc]
        def open(self, file: str) -> Any:
            # Debian leaves out two files: names of groups, which no definition needs, and irregular forms, which a
            # folder may have in part.
            if file == "lexnames" and not (folder / file).is_file():
                return io.StringIO("".join(f"{number:02d}\tgroup\t1\n" for number in range(_LEXICOGRAPHER_FILES)))
            if file.endswith(".exc") and not (folder / file).is_file():
                return io.StringIO("")
            streams.append(super().open(file))
            return streams[-1]

        def map_wn(self, version: str = "wordnet") -> None:
            # A table for other languages, for which nltk would look for a second WordNet among its own data.
            del version

    place = str(folder.resolve())
    # nltk reads below the folders of its own list only.
    if place not in nltk.data.path:
        nltk.data.path.append(place)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Reader(place, None)
    # A broken file ends in whatever the reader's parsing stumbles over.
    except (WordNetError, AssertionError, ValueError, LookupError, OSError, TypeError) as problem:
        raise UserError(
            f"WordNet in '{printable(place)}' cannot be read ({type(problem).__name__}); install wordnet-base again."
        ) from problem
