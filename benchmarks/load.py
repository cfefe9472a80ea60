"""Time and memory to load a model, beside transformers, torch.load and llama.cpp: GPT-2 124M, and Llamas of any size.

    python benchmarks/load.py [--rounds 5] [--json]
    python benchmarks/load.py --sizes [5M 135M 1B 7B] [--folder DIR] [--rounds 3] [--json]

Protocol: hostile random weights of the 124M shape (fp32, 497.8 MB), file in the page cache (read once before), each
contender in a fresh process, contenders interleaved, medians over the rounds. `load`: from the path to a model that is
ready to run, imports aside. `first logits`: the first forward pass of 32 tokens after that, where mapped pages are
touched for the first time. `private`: peak growth of the process's private memory (RssAnon) during the load, and during
load and first logits together; mapped file pages are not counted, they belong to the page cache and can be dropped.

`--sizes`: the same for bfloat16 files of zeros in Llama's shape (a few MB to 14 GB), sparse, so that the disk plays no
part; in the place of the first logits all bytes of all parameters are touched once, a byte of each page. llama.cpp gets
the same tensors as GGUF, and computes a token, which reads all weights too. A 7B model as private memory, read and then
copied (`torch.load`, `load_state_dict`), does not fit into 24 GB twice, and is left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
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
# As above, for `--sizes`; `touch` replaces the first logits, and is `TOUCH` where nothing else is said.
LLAMAS: dict[str, tuple[str, ...]] = {
    "loadstone": (
        "from loadstone.load import load_model, open_source\nimport loadstone.model, loadstone.checkpoint.safetensors",
        "model = load_model(open_source(folder))",
    ),
    "transformers": (
        "from transformers import LlamaForCausalLM",
        "model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()",
    ),
    "torch.load, mmap, meta, assign": (
        "from loadstone.model import GPT\nfrom loadstone.load import open_source",
        "with torch.device('meta'):\n    model = GPT(open_source(folder).config).eval()\n"
        "model.load_state_dict(torch.load(folder / 'model.pth', mmap=True), assign=True)",
    ),
    "torch.load, load_state_dict": (
        "from loadstone.model import GPT\nfrom loadstone.load import open_source\n"
        "torch.set_default_dtype(torch.bfloat16)",
        "model = GPT(open_source(folder).config).eval()\nmodel.load_state_dict(torch.load(folder / 'model.pth'))",
    ),
    "loadstone, GGUF": (
        "from loadstone.load import load_model, open_source\nimport loadstone.model, loadstone.checkpoint.gguf",
        "model = load_model(open_source(folder / 'model.gguf'), dtype='bfloat16')",  # else its vectors make it float32
    ),
    "llama.cpp, GGUF": (
        "from llama_cpp import Llama",
        "model = Llama(str(folder / 'model.gguf'), n_ctx=32, n_batch=32, n_threads=torch.get_num_threads(),"
        " verbose=False)",
        "model.eval([1])",
    ),
}
TOUCH = "sum(int(p.detach().view(torch.uint8).flatten()[::4096].sum()) for p in model.parameters())"
SHAPES = {  # width, inner width, layers, heads, heads of keys and values
    "5M": (64, 192, 4, 4, 4),
    "135M": (576, 1536, 30, 9, 3),
    "1B": (2048, 5632, 22, 32, 4),
    "7B": (4096, 11008, 32, 32, 32),
}
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
          "vocab_size")  # fmt: skip
TOO_LARGE = {("7B", "torch.load, load_state_dict")}
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
    {first}
first = time.perf_counter()
peak[0] = max(peak[0], anonymous())
done.set()
found = dict(load=loaded - began, first=first - loaded, private_load=private_load, private=peak[0] - before)
print(json.dumps(found | dict(check=float(logits[0, -1, 7]))))
"""
LOGITS = "logits = model(torch.arange(32)[None])"


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


def write_llama(folder: Path, shape: tuple[int, ...]) -> int:
    """A Llama of zeros with GPT-2's vocabulary as HuggingFace safetensors, state dict of our model, and GGUF; bytes."""
    import large_models
    from loadstone.checkpoint.write_torch import write_torch
    from loadstone.layouts import LAYOUTS, Job
    from loadstone.load import load_tokenizer_for, open_source
    from loadstone.tokenizer.export import tokenizer_files
    from loadstone.tokenizer.gpt2 import gpt2_tokenizer
    from loadstone.weightmap import Translated, table_for

    sizes = dict(zip(_SIZES, (*shape, 50257), strict=True))
    nbytes = large_models.write(folder, sizes, 1 << 40)
    (folder / "model.safetensors.index.json").unlink()
    next(folder.glob("*.safetensors")).rename(folder / "model.safetensors")
    for name, text in tokenizer_files(gpt2_tokenizer(), "hf").items():
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    identity = open_source(folder)
    write_torch(Translated(identity, table_for("llama", "loadstone")), folder / "model.pth")
    job = Job(identity, Translated(identity, table_for("llama", "gguf")), load_tokenizer_for(identity))
    LAYOUTS["gguf"].write(job, folder / "model.gguf")
    return nbytes


def measure(folder: Path, name: str) -> dict[str, float]:
    imports, load = CONTENDERS[name]
    return run(CHILD.format(folder=str(folder), imports=imports, load=load, first=LOGITS))


def measure_llama(folder: Path, name: str) -> dict[str, float]:
    imports, load, *touch = LLAMAS[name]
    ending = "gguf" if "GGUF" in name else "pth" if "torch.load" in name else "safetensors"
    with (folder / f"model.{ending}").open("rb", buffering=0) as file:
        while file.read(1 << 24):  # into the page cache, which may not hold all three
            pass
    first = f"{(touch or [TOUCH])[0]}\n    logits = torch.zeros(1, 1, 8)"
    return run(CHILD.format(folder=str(folder), imports=imports, load=load, first=first))


def run(code: str) -> dict[str, float]:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--sizes", nargs="*", choices=[*SHAPES], help="Llamas of these sizes; none named: all")
    parser.add_argument("--folder", type=Path, help="where")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.sizes is None:
        found = {"GPT-2 124M": gpt2(arguments.folder, arguments.rounds or 5)}
    else:
        found = {size: llama(size, arguments.folder, arguments.rounds or 3) for size in arguments.sizes or SHAPES}
    if arguments.json:
        print(json.dumps(found, indent=2))
        return
    for size, medians in found.items():
        print(f"{size:32} {'load ms':>9} {'ratio':>7} {'private MB':>11} {'first ms':>16} {'private MB':>11}")
        ours = medians["loadstone"]["load"]
        for name, row in medians.items():
            load = f"{row['load'] * 1e3:>9.1f} {row['load'] / ours:>6.1f}x {row['private_load'] / 1e6:>11.1f}"
            print(f"{name:32} {load} {row['first'] * 1e3:>16.1f} {row['private'] / 1e6:>11.1f}")


def gpt2(where: Path | None, rounds: int) -> dict[str, dict[str, Any]]:
    with tempfile.TemporaryDirectory(dir=where) as temporary:
        write_files(Path(temporary))
        rows = in_turns(CONTENDERS, rounds, lambda name: measure(Path(temporary), name))
    checks = [row["check"] for found in rows.values() for row in found]
    if max(checks) - min(checks) > 1e-3 * max(1.0, abs(checks[0])):
        sys.exit(f"the contenders do not compute the same model: {checks}")
    return medians(rows)


def llama(size: str, where: Path | None, rounds: int) -> dict[str, dict[str, Any]]:
    with tempfile.TemporaryDirectory(dir=where) as temporary:
        nbytes = write_llama(Path(temporary), SHAPES[size])
        print(f"{size}: {nbytes / 1e6:,.0f} MB of tensors", file=sys.stderr)
        names = [name for name in LLAMAS if (size, name) not in TOO_LARGE]
        return medians(in_turns(names, rounds, lambda name: measure_llama(Path(temporary), name)))


def in_turns(
    names: Iterable[str], rounds: int, measured: Callable[[str], dict[str, float]]
) -> dict[str, list[dict[str, float]]]:
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for number in range(rounds):
        for name, found in rows.items():
            print(f"round {number + 1}: {name}", file=sys.stderr)
            found.append(measured(name))
    return rows


def medians(rows: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, Any]]:
    return {name: {key: statistics.median(row[key] for row in found) for key in KEYS} for name, found in rows.items()}


if __name__ == "__main__":
    main()
