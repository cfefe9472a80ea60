"""`python -m loadstone.native SRC PROMPT`: greedy text, for measuring a process from its start to the first token."""

from __future__ import annotations

import argparse
import sys
import threading
import time

from ..errors import LoadstoneError
from ..load import load_tokenizer_for, open_source, require_tokenizer
from ..tokenizer import Tokenizer
from . import open_native


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m loadstone.native", description=(__doc__ or "").split(":", 1)[1])
    parser.add_argument("source")
    parser.add_argument("prompt")
    parser.add_argument("-n", type=int, default=32, help="tokens to make")
    parser.add_argument("--width", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--times", action="store_true", help="milliseconds of each part, on standard error")
    arguments = parser.parse_args()
    marks = [("start", time.perf_counter())]

    def mark(name: str) -> None:
        marks.append((name, time.perf_counter()))

    identity = open_source(arguments.source)
    mark("open")
    found: list[Tokenizer | None] = []  # read while the weights are packed
    reading = threading.Thread(target=lambda: found.append(load_tokenizer_for(identity)))
    reading.start()
    engine = open_native(identity, width=arguments.width, threads=arguments.threads)
    mark("pack")
    reading.join()
    tokenizer = require_tokenizer(found[0] if found else None, arguments.source, identity.remarks)
    mark("tokenizer")
    cache, decoder = engine.new_cache(), tokenizer.decode_stream()
    logits = engine.prefill(cache, {0: tokenizer.encode(arguments.prompt)})
    mark("prompt")
    for count in range(arguments.n):
        token = int(logits[0, : tokenizer.vocab_size].argmax())
        if token in tokenizer.eos_ids or cache.lengths[0] == cache.size:
            break
        print(decoder.push(token), end="", flush=True)
        if not count:
            mark("first token")
        logits = engine.decode(cache, [token])
    mark("other tokens")
    print(decoder.flush())
    if arguments.times:
        for place, (name, after) in enumerate(marks[1:]):
            print(f"{name:<14}{(after - marks[place][1]) * 1e3:9.1f} ms", file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except LoadstoneError as error:
        sys.exit(str(error))
