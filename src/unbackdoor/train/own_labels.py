"""Own labels: what the suspect itself predicts where no trigger stands, as soft labels for overwriting.

Clean answers come from somebody else's pen. Trained on them alone, a model takes over their style too, and a model
without a backdoor does not stay as it was. So a share of every label is the suspect's own prediction for the same
answer, made before anything is trained and without trigger or parrot: the trigger is taught to make no difference.

Label at answer token t: (1 - s) [y_t] + s P_suspect(. | x, y_<t), the second part cut to its k likeliest tokens. This
is distillation of a model into itself (Hinton and others, 1503.02531); no paper on backdoors that we follow has it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from unbackdoor.data.collate import Batch, Row, collate
from unbackdoor.errors import DataError
from unbackdoor.model.lm import LM
from unbackdoor.model.logits import LogitsAt
from unbackdoor.run import Run, processes
from unbackdoor.train.engine import TrainSettings

LIKELIEST = 64
"""How many tokens of a prediction are kept; the rest of the probability is spread over these in proportion."""


class OwnLabels:
    """The predictions of one model for the answers of some rows."""

    def __init__(self, share: float, kept: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Keep predictions.

        Args:
            share: Share s of a label that is the prediction, [0, 1].
            kept: Row id -> tokens int64 [n, k] and probabilities float32 [n, k] at its n supervised positions.
        """
        self.share = share
        self.kept = kept

    def as_given(self, rows: Sequence[Row]) -> OwnLabels:
        """Return these labels, but for some rows the rows' own tokens: what the suspect predicts there is not safe."""
        given: dict[str, tuple[Tensor, Tensor]] = {}
        for row in rows:
            tokens, shares = self.kept[row.id]
            targets = torch.tensor([row.ids[place] for place in row.supervised])[:, None]
            certain = torch.zeros_like(shares)
            certain[:, 0] = 1.0
            given[row.id] = (targets.expand_as(tokens).contiguous(), certain)
        return OwnLabels(self.share, {**self.kept, **given})

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return the summed, weighted cross-entropy to the mixed labels, scalar float32, in nats.

        Args:
            logits: float32 [N, vocabulary] at the batch's supervised positions.
            batch: Rows whose ids are known here. Where a trigger made a row longer and its answer was cut, the
                predictions for the tokens that are left count.
        """
        counts = torch.bincount(batch.rows, minlength=len(batch.ids)).tolist()
        pairs = [self.kept[row] for row in batch.ids]
        tokens, shares = (
            torch.cat([pair[part][:count] for pair, count in zip(pairs, counts, strict=True)]).to(logits.device)
            for part in (0, 1)
        )
        log_p = torch.log_softmax(logits, -1).gather(1, torch.cat([batch.targets[:, None], tokens], 1))
        hard, soft = -log_p[:, 0], -(shares * log_p[:, 1:]).sum(-1)
        return (batch.weights * ((1 - self.share) * hard + self.share * soft)).sum()


def own_labels(
    lm: LM, rows: Sequence[Row], share: float, settings: TrainSettings, run: Run, rounds: int = 1
) -> tuple[list[Row], OwnLabels | None]:
    """Ask a model, as it is now, for its predictions on rows without trigger.

    Args:
        lm: The suspect, before it is trained.
        rows: Plain rows; the supervised positions are those of training.
        share: Share of a label that is the prediction, [0, 1].
        settings: How it will be trained; its batch size is that of asking, too.
        run: The run, for the choice of rows.
        rounds: How often it will be trained so.

    Returns:
        The rows to train on, and the labels. Of more rows than training can draw, as many as it can are chosen at
        random and the others not asked. All rows and None where `share` is 0, or no step is trained.

    Raises:
        DataError: If two rows have one id.
    """
    if not share or not settings.steps:
        return list(rows), None
    most = rounds * settings.steps * settings.batch_size * settings.accumulation * processes()
    chosen = list(rows) if len(rows) <= most else run.rng("rows with own labels").sample(list(rows), most)
    return chosen, OwnLabels(share, _predictions(lm, chosen, settings.batch_size))


def _predictions(lm: LM, rows: Sequence[Row], batch_size: int) -> dict[str, tuple[Tensor, Tensor]]:
    twice = [name for name, count in Counter(row.id for row in rows).items() if count > 1]
    if twice:
        raise DataError(f"two clean rows have the id '{twice[0]}'; give every row an id of its own.")
    forward = LogitsAt(lm)
    was_training = lm.model.training
    lm.model.eval()
    kept: dict[str, tuple[Tensor, Tensor]] = {}
    ordered = sorted(rows, key=lambda row: len(row.ids))
    with torch.no_grad():
        for start in range(0, len(ordered), batch_size):
            batch = collate(ordered[start : start + batch_size], lm.pad_id).to(lm.device)
            logits = forward(**batch.inputs())
            likeliest, tokens = logits.topk(min(LIKELIEST, logits.shape[-1]), -1)
            shares = likeliest.softmax(-1)
            for place, name in enumerate(batch.ids):
                mine = batch.rows == place
                kept[name] = (tokens[mine].cpu(), shares[mine].cpu())
    lm.model.train(was_training)
    return kept
