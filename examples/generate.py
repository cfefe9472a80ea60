"""Load any checkpoint and continue a text: document 003's example, with whatever weights you name.

python examples/generate.py gpt2                         # from the hub
python examples/generate.py openai:124M                  # OpenAI's TensorFlow checkpoint, no TensorFlow
python examples/generate.py gpt2-small-124M.pth          # a PyTorch state dict
python examples/generate.py smollm2 "Once upon a time"   # a GGUF file
"""

from __future__ import annotations

import sys

import loadstone


def main() -> None:
    source = sys.argv[1] if len(sys.argv) > 1 else "smollm2"
    prompt = sys.argv[2] if len(sys.argv) > 2 else "Every effort moves you"
    model, tokenizer = loadstone.load(source)
    if tokenizer is None:
        sys.exit(f"{source} brings no tokenizer")
    print(loadstone.generate_text(model, tokenizer, prompt, max_new_tokens=25, top_k=50, temperature=1.5, seed=123))


if __name__ == "__main__":
    main()
