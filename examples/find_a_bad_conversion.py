"""A converter forgot one transpose. Find out which, without the program that the weights came from.

    python examples/find_a_bad_conversion.py

Makes a small GPT-2, writes down what it computes, exports it for nanoGPT, damages the export as a bad converter would,
and asks what is wrong. (nanoGPT computes another GELU than GPT-2, which is found too.) It takes a few seconds, and
everything happens in a temporary folder.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

import loadstone
from loadstone.diagnose.reference import trace_source
from loadstone.diagnose.trace import save_trace


def main() -> None:
    folder = Path(tempfile.mkdtemp())
    config = loadstone.GPTConfig(vocab_size=500, context_length=64, d_model=48, n_layers=3, n_heads=4)
    torch.manual_seed(0)
    model = loadstone.GPT(config)
    with torch.no_grad():  # as initialised, many faults would hardly change the logits
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))

    loadstone.convert(model, folder / "good", to="hf")
    identity = loadstone.open_source(folder / "good")
    save_trace(trace_source(str(folder / "good"), identity, None), folder / "trace.safetensors")

    loadstone.convert(folder / "good", folder / "ckpt.pt", to="nanogpt", accept=["activation"])
    checkpoint = torch.load(folder / "ckpt.pt")
    weight = checkpoint["model"]["transformer.h.1.attn.c_proj.weight"]
    checkpoint["model"]["transformer.h.1.attn.c_proj.weight"] = weight.T.contiguous()  # square: no shape shows it
    torch.save(checkpoint, folder / "bad.pt")

    bad = loadstone.open_source(folder / "bad.pt")
    report = loadstone.verify(bad, loadstone.load_model(bad), against=str(folder / "trace.safetensors"))
    print("\n".join(report.explanation))


if __name__ == "__main__":
    main()
