"""A GPT with a classification head on the last token, and its task: which text belongs to which class.

Why not as others do it: the book's chapter 6 reads the last position of the padded row, which is mostly padding;
transformers finds the last token that is not the padding token, and so needs one that never ends a text
(transformers#35352). Here the lengths are known. Nothing before the padding can see it, so there is no mask either.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checkpoint.wording import shown
from ..data.batch import Batch, Sample, Samples, collate
from ..errors import ConfigError
from ..model import GPT

if TYPE_CHECKING:
    from ..tokenizer import Tokenizer


class Classifier(nn.Module):
    """Scores for each class, from the hidden state of a text's last token.

    Args:
        gpt: the model; its head is not used.
        labels: names of the classes, in order of their ids.
        bias: for the new layer. A folder has no place for one, as transformers' classes have none.
    """

    def __init__(self, gpt: GPT, labels: Sequence[str], *, bias: bool = False) -> None:
        super().__init__()
        if len(labels) < 2 or len(set(labels)) != len(labels):
            raise ConfigError(f"a classifier needs at least two labels, all different; found {shown(list(labels))}.")
        self.gpt, self.labels = gpt, tuple(labels)
        like = gpt.tok_emb.weight
        self.score = nn.Linear(gpt.config.d_model, len(labels), bias=bias, dtype=like.dtype, device=like.device)
        nn.init.normal_(self.score.weight, std=0.02)
        if bias:
            nn.init.zeros_(self.score.bias)

    def forward(self, ids_BT: Tensor, lengths_B: Tensor) -> Tensor:
        """Scores [B, classes] of rows that are padded on the right; lengths are at least 1."""
        hidden_BTC = self.gpt.hidden(ids_BT)
        rows = torch.arange(len(ids_BT), device=ids_BT.device)
        return self.score(hidden_BTC[rows, lengths_B - 1])


class Classification:
    """The task: cross entropy of the label, and in evaluations what was right and what was said, class by class."""

    def __init__(self, labels: Sequence[str]) -> None:
        self.labels = tuple(labels)

    def loss(self, model: Classifier, batch: Batch) -> tuple[Tensor, int]:
        """Sum of the cross entropies in float32, and the number of texts."""
        scores = model(batch.inputs, batch.lengths)
        return F.cross_entropy(scores.float(), batch.targets[:, 0], reduction="sum"), len(batch)

    def score(self, model: Classifier, batch: Batch) -> dict[str, float]:
        """Sums over a batch: `loss`, `count`, `right`; for each label `of.NAME`, `right.NAME` and `said.NAME`."""
        scores, targets = model(batch.inputs, batch.lengths).float(), batch.targets[:, 0]
        said = scores.argmax(dim=1)
        sums = {
            "loss": float(F.cross_entropy(scores, targets, reduction="sum")),
            "count": float(len(batch)),
            "right": float((said == targets).sum()),
        }
        for number, name in enumerate(self.labels):
            sums[f"of.{name}"] = float((targets == number).sum())
            sums[f"right.{name}"] = float(((said == targets) & (targets == number)).sum())
            sums[f"said.{name}"] = float((said == number).sum())
        return sums

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """`val_loss` and `accuracy` (shares), and the counts of each label."""
        count = max(1.0, sums["count"])
        counts = {key: value for key, value in sums.items() if "." in key}
        return {"val_loss": sums["loss"] / count, "accuracy": sums["right"] / count, **counts}

    @torch.no_grad()
    def evaluate(self, model: Classifier, samples: Samples, batch_size: int = 32) -> dict[str, float]:
        """`metrics` over all samples."""
        was_training, device = model.training, model.score.weight.device
        model.eval()
        sums: dict[str, float] = {"loss": 0.0, "count": 0.0, "right": 0.0}
        for start in range(0, len(samples), batch_size):
            rows = [samples[i] for i in range(start, min(start + batch_size, len(samples)))]
            found = self.score(model, collate(rows).to(device))
            sums = {key: sums.get(key, 0.0) + value for key, value in found.items()}
        model.train(was_training)
        return self.metrics(sums)


@dataclass(frozen=True)
class Prediction:
    """What a text was taken for; `cut`: it is longer than the context, and its beginning alone was read."""

    label: str
    probabilities: dict[str, float]
    cut: bool = False


@torch.no_grad()
def classify(
    model: Classifier, tokenizer: Tokenizer, texts: Iterable[str], *, batch_size: int = 16
) -> list[Prediction]:
    """A prediction for each text. Raises ConfigError for one without tokens."""
    found: list[Prediction] = []
    limit, device = model.gpt.config.context_length, model.score.weight.device
    ids = [tokenizer.encode(text) for text in texts]
    if [] in ids:
        raise ConfigError(f"text {ids.index([]) + 1} is empty: it has no last token that could be classified.")
    model.eval()
    for start in range(0, len(ids), batch_size):
        rows = ids[start : start + batch_size]
        tensors = [torch.tensor(row[:limit]) for row in rows]
        batch = collate([Sample(tensor.numpy(), tensor.numpy()[:1]) for tensor in tensors]).to(device)
        shares = model(batch.inputs, batch.lengths).float().softmax(dim=1).tolist()
        for row, share in zip(rows, shares, strict=True):
            probabilities = dict(zip(model.labels, share, strict=True))
            found.append(Prediction(max(probabilities, key=probabilities.__getitem__), probabilities, len(row) > limit))
    return found
