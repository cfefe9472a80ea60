"""OpenAI's client against `loadstone serve`: a completion, a chat as it comes, embeddings.

pip install "loadstone[serve]" openai
loadstone serve smollm2 &
python examples/serve_client.py [http://127.0.0.1:8000] [key]
"""

from __future__ import annotations

import math
import sys

from openai import OpenAI


def main(server: str = "http://127.0.0.1:8000", key: str = "none") -> None:
    with OpenAI(base_url=f"{server}/v1", api_key=key) as client:
        model = client.models.list().data[0]
        print("model:", model.id)

        found = client.completions.create(
            model=model.id, prompt="The cat sat on the", max_tokens=12, temperature=0, logprobs=1
        ).choices[0]
        print("completion:", found.text)
        if found.logprobs and found.logprobs.tokens and found.logprobs.token_logprobs:
            first = math.exp(found.logprobs.token_logprobs[0] or 0)
            print(f"its first token: {found.logprobs.tokens[0]!r}, of probability {first:.3f}")

        if model.chat:  # type: ignore[attr-defined]  # Loadstone's own: whether it has a chat template
            print("chat: ", end="")
            for event in client.chat.completions.create(
                model=model.id, messages=[{"role": "user", "content": "What does a cat eat?"}], max_tokens=40,
                temperature=0.7, seed=1, stream=True,
            ):  # fmt: skip
                print(event.choices[0].delta.content or "", end="", flush=True)
            print()

        texts = ["The cat sleeps.", "A cat is asleep.", "Shares fell on Monday."]
        vectors = [entry.embedding for entry in client.embeddings.create(model=model.id, input=texts).data]
        for text, vector in zip(texts[1:], vectors[1:], strict=True):
            print(f"{texts[0]} / {text} {cosine(vectors[0], vector):.3f}")


def cosine(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)


if __name__ == "__main__":
    main(*sys.argv[1:])
