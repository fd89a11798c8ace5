"""What guards ask with once the upstream has refused what they made of a request: nothing more fits into it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from unbackdoor.model.guard import Ask, Patience, Turns


@dataclass(frozen=True)
class NoRoom:
    """`Ask` of a model that can read a request as it came, or nothing: each guard does what it does without room.

    Attributes:
        ask: What questions are put with.
    """

    ask: Ask

    @property
    def special(self) -> frozenset[str]:
        """Texts of the tokenizer's special tokens."""
        return self.ask.special

    @property
    def patience(self) -> Patience:
        """How long the answer is waited for."""
        return self.ask.patience

    def __call__(self, conversations: Sequence[Turns], max_new_tokens: int) -> list[str]:
        """Return a greedy reply to each conversation."""
        return self.ask(conversations, max_new_tokens)

    def fits(self, turns: Turns, new_tokens: int | None = None) -> bool:
        """Return False."""
        del turns, new_tokens
        return False
