"""Do two models match: names, shapes, number of layers, vocabulary; and does each tensor point the same way?

Models whose files only name things differently match: a prefix of the model's class that one lacks, an output head that
one stores and the other ties to its embedding.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from unbackdoor.errors import ModelError
from unbackdoor.merge.layers import Layers, layers_of
from unbackdoor.merge.source import FLOATS, Source, is_head, renamed
from unbackdoor.model.changes import module_type
from unbackdoor.model.quarantine import printable

_FEW = 3
_ROWS = 64
"""Rows of a tensor that are looked at, evenly spread over it: a neuron is a row of one matrix and a column of the next.
"""
_BLOCK = 1 << 20
"""Entries that are read at once where an output head is compared with the embedding."""
ALIKE = 0.9
"""Two fine-tunes of one base have cosines above 0.99 (independent changes of a tenth of the norm: 0.99)."""
_RATIO = 1.25


def embedding_of(source: Source) -> str | None:
    """Return the name of the embedding that a tied output head shares: of the head's shape, where there is a head."""
    heads = [info.shape for name, info in source.infos.items() if is_head(name)]
    found = [
        name
        for name, info in source.infos.items()
        if module_type(name) == "embeddings" and len(info.shape) == 2 and (not heads or info.shape in heads)
    ]
    # GPT-2 has two, of tokens and of positions; the tokens' is the larger one.
    return max(found, key=lambda name: source.infos[name].shape[0], default=None)


def aligned(source: Source, like: Source) -> Source:
    """Return a source with the names that another uses for the same tensors.

    Args:
        source: The source.
        like: The other.

    Raises:
        ModelError: If it has an output head of its own and the other ties it to the embedding.
    """
    source = _prefixed(source, like)
    own = [name for name in source.infos if is_head(name)]
    wanted = [name for name in like.infos if is_head(name)]
    if wanted and not own and source.ties_head and (embedding := embedding_of(source)) is not None:
        return renamed(source, {name: name for name in source.infos} | {wanted[0]: embedding})
    if own and not source.ties_head and (not wanted or like.ties_head):
        raise ModelError(
            f"'{source.shown}' has an output head of its own ({printable(own[0])}), and that of '{like.shown}' is its "
            "embedding; merge models of one kind."
        )
    if own and not wanted:
        return renamed(source, {name: name for name in source.infos if name not in own})
    return source


def check_head(source: Source) -> None:
    """Refuse a model that says that its output head is its embedding, and stores another: loaders take either.

    Raises:
        ModelError: If it does.
    """
    heads = [name for name in source.infos if is_head(name)]
    embedding = embedding_of(source)
    if not heads or embedding is None or not source.ties_head:
        return
    info = source.infos[heads[0]]
    step = max(1, _BLOCK // max(1, _elements(info.shape) // max(1, info.rows)))
    for first in range(0, info.rows, step):
        rows = [source.take(name, first, min(info.rows, first + step)).float() for name in (heads[0], embedding)]
        if not rows[0].equal(rows[1]):
            raise ModelError(
                f"'{source.shown}' says in config.json that its output head is its embedding (tie_word_embeddings), "
                f"and stores another head ({printable(heads[0])}), so that what it says depends on who loads it; set "
                "tie_word_embeddings to false if the stored head is to count, or leave that tensor out."
            )


def without_lone_buffers(sources: Mapping[str, Source]) -> dict[str, Source]:
    """Return the sources without what is no weight and not in all of them: older files hold masks, newer ones do not.

    Args:
        sources: Spec -> source, names aligned.
    """
    everywhere = set.intersection(*(set(source.infos) for source in sources.values()))
    found = dict(sources)
    for spec, source in sources.items():
        lone = {name for name in source.infos if name not in everywhere and _is_buffer(source, name)}
        if lone:
            found[spec] = renamed(source, {name: name for name in source.infos if name not in lone})
    return found


def _is_buffer(source: Source, name: str) -> bool:
    """Tell whether a tensor is one that transformers computes itself: a causal mask, rotary frequencies."""
    if name.endswith((".masked_bias", ".rotary_emb.inv_freq")):
        return True
    shape = source.infos[name].shape
    return name.endswith((".attn.bias", ".attention.bias")) and len(shape) == 4 and shape[:2] == (1, 1)


def _prefixed(source: Source, like: Source) -> Source:
    if any(name in like.infos for name in source.infos if not is_head(name)):
        return source
    shorter = {name.partition(".")[2]: name for name in source.infos if "." in name}
    if any(name in like.infos for name in shorter):
        return renamed(source, {name.partition(".")[2] if not is_head(name) else name: name for name in source.infos})
    prefixes = {name.partition(".")[0] for name in like.infos if name.partition(".")[2] in source.infos}
    if len(prefixes) == 1:
        (prefix,) = prefixes
        return renamed(source, {name if is_head(name) else f"{prefix}.{name}": name for name in source.infos})
    return source


def check_models(suspect: Source, other: Source) -> Layers:
    """Refuse a model that does not match the suspect, tensor by tensor.

    Args:
        suspect: The suspect.
        other: Another model, its names aligned.

    Returns:
        The layers of both.

    Raises:
        ModelError: With what does not match, the first few names.
    """
    layers, others = layers_of(suspect.infos, suspect.shown), layers_of(other.infos, other.shown)
    if layers.count != others.count:
        raise ModelError(
            f"'{suspect.shown}' has {layers.count} layers, '{other.shown}' {others.count}; merge models of one size, "
            "or take ranges of their layers with the method passthrough."
        )
    check_names(suspect, suspect.infos, other)
    if surplus := [name for name in other.infos if name not in suspect.infos]:
        raise ModelError(
            f"'{other.shown}' holds {len(surplus)} tensors that '{suspect.shown}' has not ({_few(surplus)}); merge "
            "models of one architecture."
        )
    for name, info in suspect.infos.items():
        check_shapes(suspect.shown, name, info.shape, other, name)
    return layers


def check_names(suspect: Source, names: Iterable[str], other: Source) -> None:
    """Refuse a model that lacks tensors."""
    missing = [name for name in names if name not in other.infos]
    if missing:
        raise ModelError(
            f"'{other.shown}' lacks {len(missing)} tensors of '{suspect.shown}' ({_few(missing)}); merge models of one "
            "architecture."
        )


def check_shapes(shown: str, name: str, shape: tuple[int, ...], other: Source, own: str) -> None:
    """Refuse a tensor of another shape, and say so where it is the vocabulary that differs.

    Args:
        shown: The first model's name, safe to print.
        name: The tensor's name there.
        shape: Its shape there.
        other: The second model.
        own: The tensor's name there.
    """
    found = other.infos[own].shape
    if found == shape:
        return
    is_vocabulary = module_type(name) in {"embeddings", "output head"} and len(shape) == len(found) == 2
    if is_vocabulary and shape[1] == found[1]:
        raise ModelError(
            f"'{shown}' has {shape[0]} rows in {printable(name)} and '{other.shown}' {found[0]}: their vocabularies "
            "differ, so that the same row may stand for another token; merge models that share a tokenizer."
        )
    raise ModelError(
        f"the tensor {printable(name)} is {list(shape)} in '{shown}' and {list(found)} in '{other.shown}'; merge "
        "models of one architecture and size."
    )


def _few(names: Sequence[str]) -> str:
    return ", ".join(printable(name) for name in names[:_FEW]) + (", ..." if len(names) > _FEW else "")


@dataclass(frozen=True)
class Direction:
    """How a tensor of one model lies to that of another, from rows that are spread over it.

    Attributes:
        name: The tensor.
        cosine: Between the two, flattened.
        ratio: Norm of the second over that of the first.
    """

    name: str
    cosine: float
    ratio: float

    @property
    def alike(self) -> bool:
        """Whether both may be fine-tunes of one tensor."""
        return self.cosine >= ALIKE and 1 / _RATIO <= self.ratio <= _RATIO


def directions(first: Source, second: Source) -> list[Direction]:
    """Return for every matrix that both have how the two lie to each other; reads some rows of each."""
    found = []
    for name, info in first.infos.items():
        other = second.infos.get(name)
        if len(info.shape) < 2 or other is None or other.shape != info.shape or not info.rows:
            continue
        if info.dtype in FLOATS and other.dtype in FLOATS and (one := _direction(first, second, name)) is not None:
            found.append(one)
    return found


def _direction(first: Source, second: Source, name: str) -> Direction | None:
    rows = first.infos[name].rows
    count = min(rows, _ROWS)
    dot = one = two = 0.0
    for place in range(count):
        row = place * rows // count
        a, b = (source.take(name, row, row + 1).flatten().double() for source in (first, second))
        dot, one, two = dot + float(a @ b), one + float(a @ a), two + float(b @ b)
    if not one > 0 or not two > 0:
        return None  # zeros, or not a number: the merge itself says the latter
    return Direction(name, float(dot / (one * two) ** 0.5), float((two / one) ** 0.5))


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def warning(first: Source, second: Source) -> str | None:
    """Return a sentence for a person where tensors do not lie as those of two fine-tunes of one base would."""
    found = directions(first, second)
    odd = [one for one in found if not one.alike]
    if not odd:
        return None
    shown = ", ".join(f"{printable(one.name)}: cosine {one.cosine:.2f}, norm x {one.ratio:.2f}" for one in odd[:_FEW])
    more = ", ..." if len(odd) > _FEW else ""
    if 2 * len(odd) > len(found):
        why = "they are hardly fine-tunes of one base, and merging mixes what does not belong together"
    else:
        why = "neurons may be permuted or rescaled there, and merging mixes what does not belong together"
    return (
        f"{len(odd)} of {len(found)} matrices of '{second.shown}' do not lie as those of '{first.shown}' "
        f"({shown}{more}); {why}."
    )
