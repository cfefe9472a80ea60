"""Time and memory to load GPT-2 124M from one safetensors file, beside transformers, safetensors and torch.load.

    python benchmarks/load.py [--rounds 5] [--json]

Protocol: hostile random weights of the 124M shape (fp32, 497.8 MB), file in the page cache (read once before), each
contender in a fresh process, contenders interleaved, medians over the rounds. `load`: from the path to a model that is
ready to run, imports aside. `first logits`: the first forward pass of 32 tokens after that, where mapped pages are
touched for the first time. `private`: peak growth of the process's private memory (RssAnon) during the load, and during
load and first logits together; mapped file pages are not counted, they belong to the page cache and can be dropped.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

# Each contender is (imports, load): the code that its users write. `folder` is given; `model(ids)` must give logits.
CONTENDERS = {
    "loadstone": (
        "from loadstone.load import load_model, open_source\nimport loadstone.model, loadstone.checkpoint.safetensors",
        "model = load_model(open_source(folder))",
    ),
    "transformers": (
        "from transformers import GPT2LMHeadModel",
        "hf = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()\nmodel = lambda ids: hf(ids).logits",
    ),
    "torch.load, load_state_dict": (
        "from loadstone.model import GPT\nfrom loadstone.config import gpt2_config",
        "model = GPT(gpt2_config(768, 12, 12)).eval()\nmodel.load_state_dict(torch.load(folder / 'model.pth'))",
    ),
    "torch.load, mmap, meta, assign": (
        "from loadstone.model import GPT\nfrom loadstone.config import gpt2_config",
        "with torch.device('meta'):\n    model = GPT(gpt2_config(768, 12, 12)).eval()\n"
        "model.load_state_dict(torch.load(folder / 'model.pth', mmap=True), assign=True)",
    ),
    "loadstone, the same .pth": (
        "from loadstone.load import load_model, open_source\nimport loadstone.model, loadstone.checkpoint.torch_pickle",
        "model = load_model(open_source(folder / 'raschka.pth'))",
    ),
}
KEYS = ("load", "private_load", "first", "private")
CHILD = """
import gc, json, re, threading, time
from pathlib import Path
import torch
folder = Path({folder!r})
{imports}
def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
peak, done = [0], threading.Event()
def watch():
    while not done.wait(0.002):
        peak[0] = max(peak[0], anonymous())
threading.Thread(target=watch, daemon=True).start()
torch.nn.Linear(8, 8)(torch.zeros(1, 8))  # wake the thread pool
gc.collect()  # of what the imports left; else a collection of torch's 100,000 objects falls into somebody's time
before = anonymous()
began = time.perf_counter()
{load}
loaded, private_load = time.perf_counter(), max(peak[0], anonymous()) - before
with torch.inference_mode():
    logits = model(torch.arange(32)[None])
first = time.perf_counter()
peak[0] = max(peak[0], anonymous())
done.set()
found = dict(load=loaded - began, first=first - loaded, private_load=private_load, private=peak[0] - before)
print(json.dumps(found | dict(check=float(logits[0, -1, 7]))))
"""


def write_files(folder: Path) -> None:
    """The same weights as HuggingFace safetensors, as a state dict of our model, and as rasbt's."""
    import torch
    from safetensors.numpy import save_file

    import dialects
    from loadstone.load import load_model, open_source
    from peers.test_gpt2_124m import CONFIG, full_size

    weights = full_size()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    own = {name: tensor.contiguous() for name, tensor in load_model(open_source(folder)).state_dict().items()}
    torch.save(own, folder / "model.pth")
    raschka = dialects.gpt2_raschka(weights)
    torch.save({name: torch.from_numpy(value) for name, value in raschka.items()}, folder / "raschka.pth")
    for file in folder.iterdir():
        file.read_bytes()


def measure(folder: Path, name: str) -> dict[str, float]:
    imports, load = CONTENDERS[name]
    code = CHILD.format(folder=str(folder), imports=imports, load=load)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_files(folder)
        for round_number in range(arguments.rounds):
            for name in CONTENDERS:
                print(f"round {round_number + 1}: {name}", file=sys.stderr)
                rows[name].append(measure(folder, name))
    checks = [row["check"] for found in rows.values() for row in found]
    if max(checks) - min(checks) > 1e-3 * max(1.0, abs(checks[0])):
        sys.exit(f"the contenders do not compute the same model: {checks}")
    medians: dict[str, dict[str, Any]] = {
        name: {key: statistics.median(row[key] for row in found) for key in KEYS} for name, found in rows.items()
    }
    if arguments.json:
        print(json.dumps(medians, indent=2))
        return
    print(f"{'':32} {'load ms':>9} {'ratio':>7} {'private MB':>11} {'first logits ms':>16} {'private MB':>11}")
    ours = medians["loadstone"]["load"]
    for name, row in medians.items():
        load = f"{row['load'] * 1e3:>9.1f} {row['load'] / ours:>6.1f}x {row['private_load'] / 1e6:>11.1f}"
        print(f"{name:32} {load} {row['first'] * 1e3:>16.1f} {row['private'] / 1e6:>11.1f}")


if __name__ == "__main__":
    main()
