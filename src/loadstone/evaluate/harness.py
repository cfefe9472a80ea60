"""lm-evaluation-harness (extra `harness`) with our models: `--model loadstone --model_args source=SRC`.

Importing this file registers the model; lm-evaluation-harness itself looks for no plug-ins, so its command is started
through this file: `python -m loadstone.evaluate.harness run --model loadstone --model_args source=tiny --tasks ...`.
Tokens, windows and scores are the same as in `loadstone eval`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import SourceError
from ..generate import generate_texts
from ..load import load, require_tokenizer
from ..tokenizer import Tokenizer
from .perplexity import stream, text_of
from .run import settings_for
from .scoring import Request, score
from .tasks.base import Asked, total

try:
    # The harness fills its registry with its own models only while that is empty: ours may not be the first.
    import lm_eval.models  # noqa: F401
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ImportError:
    raise SourceError('This needs lm-evaluation-harness: pip install "loadstone[harness]".') from None

Done = tuple[float, bool]


@register_model("loadstone")
class LoadstoneLM(LM):  # type: ignore[misc]
    """A SRC as a model of lm-evaluation-harness.

    Args:
        source: a SRC.
        dtype, device: as for `loadstone.load`.
        batch_size: rows at once; `auto` leaves it to Loadstone.
        context: tokens that the model may read, as --context of `loadstone eval`.
        others: what lm-evaluation-harness hands to every model (max_batch_size).
    """

    def __init__(
        self,
        source: str,
        *,
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int | str | None = None,
        context: int | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        self.model, tokenizer = load(str(source), dtype=dtype, device=device or "cpu")
        self.tokenizer: Tokenizer = require_tokenizer(tokenizer, str(source))
        self.context = settings_for(self.model, context, None).context
        rows = str(batch_size or "auto")
        self.batch_size = int(rows) if rows.isdecimal() else None

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.source

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[Done]:
        asked = Asked(self.tokenizer, self.context)
        return self._scored([[asked.request(*request.args)] for request in requests])

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        texts = (text_of(request.args[0], "the text of a task") for request in requests)
        streams = (stream(text, self.tokenizer, self.context, self.context) for text in texts)
        return [nats for nats, _ in self._scored([each.requests() for each in streams])]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        return [self._generated(*request.args) for request in requests]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat(chat_history, add_generation_prompt=add_generation_prompt)

    def _scored(self, items: Sequence[Sequence[Request]]) -> list[Done]:
        """The sum over the requests of each item, and whether greedy decoding would say all of it."""
        owners = [number for number, item in enumerate(items) for _ in item]
        sums, greedy = [0.0] * len(items), [True] * len(items)
        flat = [request for item in items for request in item]
        for index, scores in score(self.model, flat, batch_size=self.batch_size):
            sums[owners[index]] += total(scores)
            greedy[owners[index]] &= bool(scores.greedy.all())
        return list(zip(sums, greedy, strict=True))

    def _generated(self, context: str, options: dict[str, Any]) -> str:
        until = options.get("until") or ()
        (found,) = generate_texts(
            self.model,
            self.tokenizer,
            [context],
            max_new_tokens=int(options.get("max_gen_toks", 256)),
            stop=[until] if isinstance(until, str) else tuple(until),
            overflow="window",
            temperature=float(options.get("temperature", 0.0)) if options.get("do_sample") else 0.0,
            seed=0,
        )
        return found.text


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
