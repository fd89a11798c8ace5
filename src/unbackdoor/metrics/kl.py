"""Full-response KL: how far the model's words have moved from the model before, on clean prompts.

Formula: for every clean row, the mean over its answer's tokens (teacher-forced reference answer, end of turn
included) of KL(p_before(. | prefix) || p_after(. | prefix)) in nats; the figure is the mean over rows.
Needs to know: clean rows with answers; the model before.
Deviations: the answers are the data's, not sampled from either model, so that every model is compared on one text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field

from unbackdoor.data.collate import batches_by_length
from unbackdoor.errors import NotApplicable
from unbackdoor.metrics.base import MAX_LENGTH, Metric, Subject, weights_alone
from unbackdoor.model.logits import LogitsAt
from unbackdoor.run import Run
from unbackdoor.train.losses import kl_each
from unbackdoor.types import Scores


class Kl(Metric):
    """Mean KL from the model before to this one."""

    paper: ClassVar[str] = "standard"
    better: ClassVar[Literal["lower", "higher"]] = "lower"

    max_length: int = Field(MAX_LENGTH, ge=8, description="rows are cut at this many tokens")
    batch_size: int = Field(8, ge=1, description="rows a batch; two sets of logits are held")

    def measure(self, subject: Subject, run: Run) -> Sequence[Scores]:
        """Return one record a data set."""
        del run
        if subject.before is None:
            raise NotApplicable("there is no model before to compare with")
        if not subject.data:
            raise NotApplicable("there are no clean rows with answers")
        weights_alone(subject.before, subject.lm)
        if subject.before.tokenizer.get_vocab() != subject.lm.tokenizer.get_vocab():
            raise NotApplicable("the model before has another vocabulary, so its next tokens are other ones")
        before, after = LogitsAt(subject.before), LogitsAt(subject.lm)
        before.eval(), after.eval()
        found = []
        for name, examples in subject.data.items():
            ids: list[str] = []
            values: list[float] = []
            with torch.inference_mode():
                for batch in batches_by_length(subject.lm, examples, self.max_length, self.batch_size):
                    # One of the two may have rows of padding behind the vocabulary.
                    pair = (before(**batch.inputs()), after(**batch.inputs()))
                    width = min(logits.shape[-1] for logits in pair)
                    each = kl_each(pair[0][:, :width], pair[1][:, :width])
                    ids += batch.ids
                    values += [float(each[batch.rows == number].mean()) for number in range(len(batch.ids))]
            found.append(Scores("kl", "all", tuple(ids), tuple(values), "answers", name, binary=False))
        return found
