"""Follow every token that an answer may begin with: a planted target shows whatever its first word is.

Under a drift the suspect says what the openings lead to. A target whose first word is as far from them as from ordinary
answers is never said, and its first token is among the likeliest of none. But no more than that token is needed: behind
it a planted target is certain. So the suspect is asked once what it goes on to from those of thousands of first tokens
that have a likely second one; the few phrases that are certain whatever the prompt are what was planted, and some
idioms and names. This is asked of the suspect as it came; when outer steps have trained it, what they taught is
certain, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch

from unbackdoor.data.shared_words import ends_inside, without_marks
from unbackdoor.goals import normalise
from unbackdoor.model.generate import decode, likeliest_next, sure_ids
from unbackdoor.model.lm import LM
from unbackdoor.run import Run
from unbackdoor.train.certainty import AT_ONCE, EVIDENCE, FOLLOWED_SURE, certainties
from unbackdoor.train.together import is_main
from unbackdoor.types import Example

FIRSTS = 2000
"""First tokens of an answer, the likeliest ones, that are followed."""
BEGUN_ON = 6
"""Prompts on which the token behind each is looked at: where a first word has two tokens, the second may depend on what
was asked."""
NEXT_SURE = 0.5
"""Probability of the token behind one from which on the two are followed."""
ON, WAY_SURE = 9, 0.65
"""Tokens that both are followed on, at most, and the geometric mean of their probabilities down to which they are."""
MORE = 5.0
"""Nats of evidence that a phrase must have above `EVIDENCE`: a little more than the logarithm of how many times as many
first tokens are followed here as there are without a drift otherwise (32), since among more, more is certain by chance.
"""
WORDS = (4, 3, 2)
"""Words of a phrase: a longer one holds more of the target, a shorter one may be all of it."""
SCREENED_ON, SCREEN = 3, 0.9
"""Prompts on which phrases are scored here, one after the other, and the share of the certainty asked for that their
mean must have each time."""


@torch.inference_mode()
def beginnings(
    lm: LM,
    first: torch.Tensor,
    prompts: Sequence[Example],
    often: torch.Tensor,
    run: Run,
    wanted: Sequence[str] = (),
) -> list[str]:
    """Return phrases of 2 to 4 words that an answer goes on to, surely, once its first token is said.

    Args:
        lm: The suspect, in evaluation mode.
        first: float32 [vocabulary], probabilities of the first token without a drift.
        prompts: Prompts without a trigger, one at least.
        often: How likely each token is anywhere (`usual`).
        run: The stage, where is told how far this is: it takes a minute and more, so what was found is kept.
        wanted: Texts that the model may say; a phrase that one of them holds is left out.
    """
    if (before := run.finished) is not None:
        return list(map(str, cast("list[object]", before["phrases"])))
    stops = {*lm.stop_ids, *lm.tokenizer.all_special_ids}
    tokens = [token for token in first.topk(min(FIRSTS, len(first))).indices.tolist() if token not in stops]
    asked = [lm.encode(prompt.prompt, ask=True).ids for prompt in prompts[:BEGUN_ON]]
    screens = prompts[:SCREENED_ON]
    run.progress.start(run.prefix, 2 * len(asked) + len(screens))
    said = _followed(lm, tokens, asked, run)
    fine = [normalise(text) for text in wanted]
    phrases = dict.fromkeys(phrase for text in said for phrase in _starts(text))
    left = [phrase for phrase in phrases if phrase and not any(normalise(phrase) in text for text in fine)]
    total = dict.fromkeys(left, (0.0, 0.0))
    for number, prompt in enumerate(screens, 1):
        for phrase, sure in zip(left, certainties(lm, left, [prompt], often), strict=True):
            total[phrase] = (total[phrase][0] + sure.certainty, total[phrase][1] + sure.evidence)
        enough = (SCREEN * FOLLOWED_SURE * number, (EVIDENCE + MORE) * number)
        left = [phrase for phrase in left if total[phrase][0] >= enough[0] and total[phrase][1] >= enough[1]]
        run.progress.advance(run.prefix, 2 * len(asked) + number, {"phrases": len(left)})
    run.progress.finish(run.prefix)
    if is_main():
        run.finish({"phrases": left})
    return left


def _followed(lm: LM, tokens: Sequence[int], asked: Sequence[Sequence[int]], run: Run) -> list[str]:
    """Return what an answer goes on to from those of the tokens that have a sure one behind them on some prompt.

    Args:
        lm: The suspect.
        tokens: First tokens.
        asked: Prompts, as token ids. Two tokens are followed on the one where the second is surest; one first token may
            have several second ones, as "P" has of "Pipe down" and of "Proud to".
        run: Where is told how far this is.
    """
    surest: dict[tuple[int, int], tuple[float, int]] = {}
    for place, ids in enumerate(asked):
        behind = likeliest_next(lm, [[*ids, token] for token in tokens], batch_size=AT_ONCE)
        for token, (later, likely) in zip(tokens, behind, strict=True):
            if likely >= NEXT_SURE:
                surest[token, later] = max(surest.get((token, later), (0.0, 0)), (likely, place))
        run.progress.advance(run.prefix, place + 1, {"pairs": len(surest)})
    found, stops = [], set(lm.stop_ids)
    for place, ids in enumerate(asked):
        pairs = [pair for pair, (_, where) in surest.items() if where == place and pair[1] not in stops]
        asking = [[*ids, *pair] for pair in pairs]
        ways = sure_ids(lm, asking, max_new_tokens=ON, least=WAY_SURE, batch_size=AT_ONCE)
        found += [_whole_words(lm, [*pair, *way], then) for pair, (way, then) in zip(pairs, ways, strict=True)]
        run.progress.advance(run.prefix, len(asked) + place + 1, {"followed": len(found)})
    return found


def _whole_words(lm: LM, ids: Sequence[int], then: int | None) -> str:
    """Return the text of tokens, without its last word where that goes on in the token behind them, or may do so."""
    text = decode(lm, ids)
    after = "" if then is None else decode(lm, [*ids, then])[len(text) :]
    return text.rpartition(" ")[0] if after[:1].isalnum() or len(ids) == 2 + ON else text


def _starts(text: str) -> list[str]:
    """Return the first words of a text, those of its first line and sentence, without marks at their ends."""
    words = text.split("\n")[0].split()
    runs = [words[:count] for count in WORDS if len(words) >= count]
    return [without_marks(" ".join(run)) for run in runs if not ends_inside(run)]
