"""How much a text repeats itself: distinct-n and the share of repeated n-grams, over words.

They are what can be counted of coherence: a model that knows little goes round in circles or says the same everywhere.
High figures alone are no virtue (random words repeat nothing), so they are read beside the loss.
"""

from __future__ import annotations

from collections.abc import Sequence

REPEATED = 4  # words whose return counts as a repetition


def distinct(texts: Sequence[str], n: int) -> float | None:
    """Different n-grams / all n-grams of the texts together (Li et al. 2016, arXiv:1510.03055); None without any.

    Words are what white space separates, in small letters, so that the figure does not depend on a tokenizer. An n-gram
    lies within one text. Texts of other lengths have other figures: longer ones repeat more.
    """
    grams = [gram for text in texts for gram in _grams(text, n)]
    return len(set(grams)) / len(grams) if grams else None


def repetition(texts: Sequence[str], n: int = REPEATED) -> float | None:
    """Share of n-grams that were there before in the same text (seq-rep-n; Welleck et al. 2020, arXiv:1908.04319)."""
    counts = [(len(grams), len(set(grams))) for grams in (_grams(text, n) for text in texts)]
    total = sum(all_ for all_, _ in counts)
    return sum(all_ - different for all_, different in counts) / total if total else None


def _grams(text: str, n: int) -> list[tuple[str, ...]]:
    words = text.lower().split()
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
