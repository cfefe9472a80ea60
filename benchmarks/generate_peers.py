"""ONNX Runtime, OpenVINO and CTranslate2 as contenders of benchmarks/generate.py: model files, and what reads them.

The files are written once a run (benchmarks/generate_graphs.py), each in a process of its own, so that what is measured
imports the runtime alone. Greedy tokens of those in float32 must be those of transformers, as ours must.

Of OpenVINO's settings the fastest for a prompt of 512 (AVX-512 with bfloat16): with quantised weights, bfloat16 between
the layers, and activations quantised in groups of 768 (128 where the weights are). `g32`, for comparison: activations
in groups of 32, as in llama.cpp and in ours. Float32 is float32 throughout.

CTranslate2 has no call that reads tokens and gives the last one's logits: it streams tokens that it chose. So the
answer is that token's log-probability, and something less everywhere else; it goes on from its own token, which is the
one that it is asked to read next. A prompt costs it one pass over all tokens but the last and one over that.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.generate_graphs import CACHES, CONTEXT, HEAD_WIDTH, HEADS, VOCABULARY

Ids = list[int]
Read = Callable[[Ids], np.ndarray]  # reads tokens after those before; the last one's logits
Contender = tuple[Read, Callable[[], None], float]  # read, forget everything, MB of weights

PEERS = [
    "onnx-float32", "onnx-int8", "onnx-int4",
    "openvino-float32", "openvino-bfloat16", "openvino-int8", "openvino-int4", "openvino-g32-int8", "openvino-g32-int4",
    "ctranslate2-float32", "ctranslate2-int8",
]  # fmt: skip
NEEDS = {  # kind -> what must be importable
    "onnx": ("onnxruntime", "onnx", "onnx_ir"), "openvino": ("openvino", "nncf"), "ctranslate2": ("ctranslate2",),
    "llama": ("llama_cpp",), "transformers": ("transformers",),
}  # fmt: skip
BITS = {"32": 32, "16": 16, "8": 8, "8_0": 8, "4": 4, "4_0": 4}  # by how a contender's name ends
GRAPHS = Path(__file__).with_name("generate_graphs.py")
QUIET = {"CI": "true"}  # importing OpenVINO reports to its maker otherwise


def missing(name: str) -> str:
    """The first module that contender `name` needs and that is not installed; empty if none."""
    return next((module for module in NEEDS.get(name.partition("-")[0], ()) if not find_spec(module)), "")


def write_peers(place: Path, names: list[str]) -> None:
    """The model in `place / "model"`, as GPT-2's own names have it, into `place / name` for each of ours in `names`."""
    for name in (name for name in names if name in PEERS):
        print(f"{time.strftime('%H:%M:%S')} writing {name}", file=sys.stderr, flush=True)
        command = [sys.executable, "-W", "ignore", str(GRAPHS), name, str(place)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | QUIET)
        if done.returncode:
            sys.exit(f"{name}: its files could not be written\n{done.stderr[-2000:]}")


def bits_of(name: str) -> int:
    return next(bits for end, bits in BITS.items() if name.endswith(end))


def best_peer(name: str, key: str, runs: list[dict[str, dict[str, Any]]]) -> tuple[str, float] | None:
    """The fastest other program of `name`'s width, and how many times faster `name` is (the median over rounds)."""
    others = [other for other in runs[0] if other.partition("-")[0] not in ("native", "torch")]
    others = [other for other in others if bits_of(other) == bits_of(name)]
    if not others:
        return None
    best = max(others, key=lambda other: statistics.median(run[other][key] for run in runs))
    return best, statistics.median(run[name][key] / run[best][key] for run in runs)


def onnx(place: Path, width: str, threads: int) -> Contender:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    folder = place / f"onnx-{width}"
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    bound = session.io_binding()
    value = onnxruntime.OrtValue.ortvalue_from_numpy
    for name in CACHES:  # read and written in one place
        cache = value(np.zeros((1, HEADS, CONTEXT, HEAD_WIDTH), np.float32))
        bound.bind_ortvalue_input(f"past_{name}", cache)
        bound.bind_ortvalue_output(name, cache)
    logits = value(np.zeros((1, VOCABULARY), np.float32))
    bound.bind_ortvalue_output(session.get_outputs()[0].name, logits)
    length = [0]

    def read(ids: Ids) -> np.ndarray:
        start, length[0] = length[0], length[0] + len(ids)
        bound.bind_cpu_input("ids", np.array([ids]))
        bound.bind_cpu_input("positions", np.arange(start, length[0])[None])
        bound.bind_cpu_input("last_place", np.array([length[0] - 1], np.int32))
        bound.bind_cpu_input("total", np.array(length[0], np.int32))
        session.run_with_iobinding(bound)
        return logits.numpy()[0]

    # Quantised, the embedding is a table of its own in float32, of which a token reads one row.
    table = 0 if width == "float32" else VOCABULARY * HEADS * HEAD_WIDTH * 4
    return read, lambda: length.__setitem__(0, 0), size_of(folder) - table / 1e6


OPENVINO: dict[str, dict[str, Any]] = {
    "float32": {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"},
    "bfloat16": {"INFERENCE_PRECISION_HINT": "bf16"},
    "int8": {"INFERENCE_PRECISION_HINT": "bf16", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 768},
    "int4": {"INFERENCE_PRECISION_HINT": "bf16", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 128},
}
OPENVINO |= {f"g32-{width}": OPENVINO[width] | {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 32} for width in ("int8", "int4")}


def openvino(place: Path, width: str, threads: int) -> Contender:
    from openvino import Core, Tensor

    folder = place / f"openvino-{width}"
    settings = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": threads, **OPENVINO[width]}
    request = Core().compile_model(folder / "model.xml", "CPU", settings).create_infer_request()
    request.set_tensor("beam", Tensor(np.zeros(1, np.int32)))
    length = [0]

    def read(ids: Ids) -> np.ndarray:
        start, length[0] = length[0], length[0] + len(ids)
        request.set_tensor("ids", Tensor(np.array([ids])))
        request.set_tensor("positions", Tensor(np.arange(start, length[0])[None]))
        request.infer()
        return request.get_output_tensor(0).data[0]

    def forget() -> None:
        request.reset_state()
        length[0] = 0

    return read, forget, size_of(folder)


def ctranslate2(place: Path, width: str, threads: int) -> Contender:
    import ctranslate2

    folder = place / f"ctranslate2-{width}"
    generator = ctranslate2.Generator(str(folder), "cpu", compute_type=width, inter_threads=1, intra_threads=threads)
    steps: list[Iterator[Any]] = []

    def read(ids: Ids) -> np.ndarray:
        if not steps:
            prompt, most = [str(token) for token in ids], CONTEXT - len(ids)
            steps.append(generator.generate_tokens(prompt, max_length=most, min_length=most, return_log_prob=True))
        step = next(steps[0])
        answer = np.full(VOCABULARY, step.log_prob - 1, np.float32)
        answer[step.token_id] = step.log_prob
        return answer

    def forget() -> None:
        steps.pop().close()  # type: ignore[attr-defined]  # a generator; it waits for its thread

    return read, forget, size_of(folder)


def size_of(folder: Path) -> float:
    """MB."""
    return sum(path.stat().st_size for path in folder.iterdir()) / 1e6


MAKERS: dict[str, Callable[[Path, str, int], Contender]] = {
    "onnx": onnx, "openvino": openvino, "ctranslate2": ctranslate2,
}  # fmt: skip
