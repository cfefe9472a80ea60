"""Published figures of GPT-2, each with its protocol: what a measured value is held against."""

from __future__ import annotations

from typing import NamedTuple

from ..config import PRESETS, GPTConfig


class Anchor(NamedTuple):
    """A figure that somebody published. `of` is the preset; accuracies are shares, not percent."""

    of: str
    task: str
    metric: str
    value: float
    protocol: str
    source: str


_PAPER = "GPT-2 paper, table 3"
_THEIRS = "de-tokenised (their de-tokeniser is not published)"
_WHOLE = "token level, stride 1024, rows joined by blank lines"
_HALF = "token level, stride 512, rows joined by blank lines"
_SIZES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
# Radford et al. 2019, table 3, by size. The protocol in words: openai/gpt-2#78.
_TABLE = (
    ("wikitext2_paper", "paper_perplexity", (29.41, 22.76, 19.93, 18.34), _THEIRS),
    ("ptb_paper", "paper_perplexity", (65.85, 47.33, 40.31, 35.76), _THEIRS),
    ("lambada", "last_token_perplexity", (35.13, 15.60, 10.87, 8.63), "last token"),
    ("lambada", "last_token_acc", (0.4599, 0.5548, 0.6012, 0.6324), "last token, with a filter of stop words"),
)  # fmt: skip
ANCHORS: tuple[Anchor, ...] = (
    *(
        Anchor(size, task, metric, value, protocol, _PAPER)
        for task, metric, values, protocol in _TABLE
        for size, value in zip(_SIZES, values, strict=True)
    ),
    Anchor("gpt2", "wikitext2", "token_perplexity", 29.94, _WHOLE, "transformers#13761, llm.c PR #276"),
    Anchor("gpt2", "wikitext2", "token_perplexity", 29.17, "token level, context 1024", "transformers#483"),
    Anchor("gpt2", "wikitext2", "token_perplexity", 43.34, "token level, context 256", "transformers#483"),
    Anchor("gpt2", "wikitext2_paper", "word_perplexity", 37.37, "lm-evaluation-harness", "transformers#13761"),
    Anchor("gpt2", "ptb", "token_perplexity", 52.53, "token level", "transformers#13786"),
    Anchor("gpt2", "ptb", "word_perplexity", 79.65, "word level", "transformers#13786"),
    Anchor("gpt2", "lambada", "last_token_acc", 0.4667, "last token", "transformers#13761"),
    Anchor("gpt2", "hellaswag", "acc", 0.2859, "completion style, 10,042 items", "llm.c hellaswag.py"),
    Anchor("gpt2", "hellaswag", "acc_token", 0.2955, "completion style, 10,042 items", "llm.c hellaswag.py"),
    Anchor("gpt2-large", "wikitext2", "token_perplexity", 19.44, _WHOLE, "transformers on perplexity"),
    Anchor("gpt2-large", "wikitext2", "token_perplexity", 16.45, _HALF, "transformers on perplexity"),
    Anchor("gpt2-xl", "wikitext2_paper", "word_perplexity", 17.48, "lm-evaluation-harness", "GPT-Neo's README"),
    Anchor("gpt2-xl", "lambada", "perplexity", 10.63, "lm-evaluation-harness", "lm-evaluation-harness#911"),
    Anchor("gpt2-xl", "lambada", "acc", 0.5121, "lm-evaluation-harness", "GPT-Neo's README"),
    Anchor("gpt2-xl", "hellaswag", "acc", 0.3842, "completion style, 10,042 items", "llm.c hellaswag.py"),
    Anchor("gpt2-xl", "hellaswag", "acc_token", 0.4893, "completion style, 10,042 items", "llm.c hellaswag.py"),
    Anchor("gpt2-xl", "winogrande", "acc", 0.5940, "lm-evaluation-harness", "GPT-Neo's README"),
    Anchor("gpt2-xl", "piqa", "acc", 0.7078, "lm-evaluation-harness", "GPT-Neo's README"),
)  # fmt: skip


def size_of(config: GPTConfig) -> str | None:
    """The preset that a model has the shape of; None if it is no GPT-2."""
    shape = (config.architecture, config.vocab_size, config.context_length, config.d_model, config.n_layers)
    for name, preset in PRESETS.items():
        if shape == (preset.architecture, preset.vocab_size, preset.context_length, preset.d_model, preset.n_layers):
            return name
    return None


def anchors_for(config: GPTConfig, task: str) -> list[Anchor]:
    """What was published for a model of this shape on a task."""
    size = size_of(config)
    return [anchor for anchor in ANCHORS if size == anchor.of and task == anchor.task]
