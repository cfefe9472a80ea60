"""GPT-2 on Modular's MAX, in the five steps of MAX's own tutorial: load, transpose, tokenizer, compile, prompt loop.

    pip install 'loadstone[max]'
    python examples/max_gpt2.py gpt2             # or a Llama, a GGUF file, `tiny`: any source
    loadstone chat gpt2 --engine max             # the same as one command

The tutorial transposes every module called c_attn, c_proj or c_fc after loading. Here the file's dialect says which
tensors are stored [in, out], and the matrices that are not square must agree; a file of another program is right too.
"""

from __future__ import annotations

import sys
import time

import loadstone
from loadstone.engines import start_engine
from loadstone.weightmap.ops import Transpose


def main() -> None:
    source = sys.argv[1] if len(sys.argv) > 1 else "gpt2"

    # 1. Load the pretrained weights: in float32, which is what MAX computes in on a CPU.
    identity = loadstone.open_source(source)
    model = loadstone.load_model(identity, dtype="float32")

    # 2. Transpose what the file stores as [in, out]. That was part of loading (as views: nothing is copied).
    turned = [step.source for step in identity.plan.steps if any(isinstance(op, Transpose) for op in step.ops)]
    print(f"{len(identity.plan.steps)} tensors loaded, {len(turned)} of them transposed")

    # 3. The tokenizer that belongs to the model.
    tokenizer = loadstone.load_tokenizer_for(identity)
    if tokenizer is None:
        sys.exit(f"{source} brings no tokenizer")

    # 4. Compile: symbolic batch and sequence length, so once for all prompts. MAX keeps the result on disk.
    began = time.perf_counter()
    engine = start_engine("max", model)
    print(f"compiled in {time.perf_counter() - began:.1f} s; quit, exit or q leaves")

    # 5. The prompt loop.
    while True:
        try:
            prompt = input("Enter your prompt: ").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if prompt.lower() in ("quit", "exit", "q"):
            return
        if prompt:
            for piece in loadstone.stream_text(engine, tokenizer, prompt, max_new_tokens=50, temperature=0.8):
                print(piece, end="", flush=True)
            print()


if __name__ == "__main__":
    main()
