"""Small files to begin fuzzing from: a tiny model in every format, and the pickles that attackers write.

Files in `corpus/FORMAT/` come on top: some that torch itself wrote, and every input that once broke a reader.
"""

from __future__ import annotations

import io
import json
import pickle
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

import dialects
import small_vocabularies
from bundle_writer import write_bundle
from gguf_files import ARRAY, F32, STRING, U32, gguf_file, pair, strings, tensor, text
from hostile_pickle import CALLS, mapping, pickled, storage, tuple_of, write_legacy, write_zip
from hostile_pickle import tensor as pickled_tensor

CORPUS = Path(__file__).parent / "corpus"
CONFIG = {
    "model_type": "gpt2", "vocab_size": 7, "n_positions": 5, "n_embd": 4, "n_layer": 1, "n_head": 2,
    "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
}  # fmt: skip
LLAMA_CONFIG = {
    "model_type": "llama", "vocab_size": 7, "max_position_embeddings": 5, "hidden_size": 8, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 12, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 8192},
}  # fmt: skip
TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] | trim }}{% endfor %}"

GPT2 = dialects.gpt2_hf(vocab=7, context=5, width=4, layers=1)
META = dialects.llama_meta(vocab=7, width=8, layers=1, heads=2, kv_heads=1, d_ff=12)
LLAMA = dialects.llama_hf(META, heads=2, kv_heads=1)
SHARD = "model-00001-of-00002.safetensors"
SHARDS = {
    SHARD: save(dict(list(GPT2.items())[::2]), {"format": "pt"}),
    "model-00002-of-00002.safetensors": save(dict(list(GPT2.items())[1::2])),
}


def corpus(name: str) -> list[bytes]:
    return [file.read_bytes() for file in sorted((CORPUS / name).glob("*"))]


def safetensors() -> list[bytes]:
    mixed = {"a": np.arange(6, dtype=np.int64).reshape(1, 2, 3), "b": np.zeros((0, 4), np.float16), "c": np.array(True)}
    return [save(GPT2, {"format": "pt"}), save(LLAMA), save(mixed, {"d": "a"}), save({})]


def index() -> list[bytes]:
    names = list(GPT2)
    files = dict.fromkeys(names[::2], SHARD) | dict.fromkeys(names[1::2], "model-00002-of-00002.safetensors")
    return [json.dumps({"metadata": {"total_size": 1, "lm_head.weight": names[0]}, "weight_map": files}).encode()]


_STORAGES = {str(i): array.tobytes() for i, array in enumerate(GPT2.values())}


def _states() -> list[bytes]:
    """A state dict as pickle opcodes, a training checkpoint, a pickled module; storages as in `_STORAGES`."""
    state = mapping(
        **{
            name: pickled_tensor(storage(str(i), array.size), 0, array.shape, tuple(s // 4 for s in array.strides))
            for i, (name, array) in enumerate(GPT2.items())
        }
    )
    held = storage(numel=GPT2[next(iter(GPT2))].size)
    args = mapping(n_layer=b"K\x01", n_head=b"K\x02", bias=b"\x88", note=b"N")
    module = b"cmodels\nNet\n)\x81" + mapping(
        _parameters=mapping(w=pickled_tensor(held, 2, (2, 3), (1, 2))), _buffers=b"}", _modules=b"}"
    )
    return [state, mapping(model=state, model_args=args, iter_num=b"K\x05"), module + b"b"]


def _file(write: Callable[[Path], Any]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        write(path := Path(folder) / "x")
        return path.read_bytes()


def torch_zip() -> list[bytes]:
    held = [_file(partial(write_zip, value=state, storages=_STORAGES)) for state in _states()]
    deflated = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(held[0])) as old, zipfile.ZipFile(deflated, "w", zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    return [*held, deflated.getvalue(), *corpus("torch-zip")]


def torch_legacy() -> list[bytes]:
    storages = {key: (len(raw) // 4, raw) for key, raw in _STORAGES.items()}
    *states, module = _states()
    held = [_file(partial(write_legacy, value=state, storages=storages)) for state in states]
    alone = _file(partial(write_legacy, value=module, storages={"0": storages["0"]}))
    return [*held, alone, *corpus("torch-legacy")]


def pickles() -> list[bytes]:
    plain = [{"a": [1, 2.5, None, True, "é", b"\xff", (1, (2, {3}))], (1, "k"): 1 << 200, 2: frozenset("ab")}, 3 + 4j]
    written = [pickle.dumps(value, protocol) for value in plain for protocol in range(6)]
    itself = b"\x80\x02]q\x00" + b"h\x00a" * 30 + b"."
    laughs = b"\x80\x02)q\x00" + b"".join(bytes((104, i, 104, i, 0x86, 113, i + 1)) for i in range(60)) + b"."
    calls = [pickled(mapping(w=pickled_tensor(), bad=value)) for value in CALLS.values()]
    return [*written, itself, laughs, *calls, *(pickled(state) for state in _states()), pickled(tuple_of(b")" * 200))]


def gguf() -> list[bytes]:
    vocab, merges = {"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3, "Ġ": 4, "Ġa": 5, "c": 6}, ["a b", "Ġ a"]
    pairs = [
        pair("general.architecture", STRING, text("llama")),
        *(pair(f"llama.{key}", U32, value.to_bytes(4, "little")) for key, value in {
            "context_length": 5, "embedding_length": 8, "block_count": 1, "feed_forward_length": 12,
            "attention.head_count": 2, "attention.head_count_kv": 1, "rope.dimension_count": 4,
        }.items()),
        pair("llama.attention.layer_norm_rms_epsilon", F32, np.float32(1e-5).tobytes()),
        pair("tokenizer.ggml.model", STRING, text("gpt2")),
        pair("tokenizer.ggml.pre", STRING, text("gpt-2")),
        pair("tokenizer.ggml.tokens", ARRAY, strings(list(vocab))),
        pair("tokenizer.ggml.token_type", ARRAY, b"\5\0\0\0" + (7).to_bytes(8, "little")
             + np.array([1, 1, 1, 3, 1, 1, 1], np.int32).tobytes()),
        pair("tokenizer.ggml.merges", ARRAY, strings(merges)),
        pair("tokenizer.ggml.eos_token_id", U32, (3).to_bytes(4, "little")),
        pair("tokenizer.chat_template", STRING, text(TEMPLATE)),
    ]  # fmt: skip
    infos, data = [], b""
    for name, array in dialects.llama_gguf(META).items():
        infos.append(tensor(name, array.shape[::-1], 0, len(data)))
        data += array.tobytes() + b"\0" * (-array.nbytes % 32)
    blocks = np.arange(34 * 4, dtype=np.uint8).tobytes()
    quantised = [tensor("q8", [32, 2], 8, 0), tensor("q4", [32, 2], 2, 96), tensor("new", [9], 57, 160)]
    return [gguf_file(pairs, infos, data), gguf_file(pairs[:1], quantised, blocks + b"\0" * 60)]


@cache
def bundle_files() -> dict[str, bytes]:
    """OpenAI's folder: the index is what is mutated, the rest lies beside it."""
    with tempfile.TemporaryDirectory() as folder:
        write_bundle(
            Path(folder) / "model.ckpt", dialects.gpt2_openai(GPT2), cuts={"model/wte": (0, [3])}, block_size=300
        )
        return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


def bundle() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        snappy = write_bundle(
            Path(folder) / "m", {"a": np.ones((2, 3)), "b": np.array(1), "c": np.ones((0, 2))}, snappy=True
        ).read_bytes()
    return [bundle_files()["model.ckpt.index"], snappy]


def state() -> list[bytes]:
    return [
        b'model_checkpoint_path: "model.ckpt"\nall_model_checkpoint_paths: "model.ckpt"\n',
        b'model_checkpoint_path: "/srv/run\\\\x/../mod\\145l.ckpt"\n',
    ]


def config() -> list[bytes]:
    return [json.dumps(CONFIG).encode(), json.dumps(LLAMA_CONFIG).encode()]


@cache
def tokenizer_files() -> Mapping[str, bytes]:
    """What may lie beside a model, by name; the first byte of a fuzzed input chooses the one that is replaced."""
    vocab, merges = small_vocabularies.byte_level()
    kept = dict(sorted(vocab.items(), key=lambda item: item[1])[:300])
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    left = [merge for merge in merges if {*merge, "".join(merge)} <= kept.keys()]
    backend = Tokenizer(models.BPE(kept, left))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>"])
    named = {"eos_token": "<|endoftext|>", "chat_template": TEMPLATE, "tokenizer_class": "GPT2Tokenizer"}
    return {
        "tokenizer.json": backend.to_str().encode(),
        "tokenizer_config.json": json.dumps(named).encode(),
        "generation_config.json": b'{"eos_token_id": [300, 5], "bos_token_id": 300}',
        "special_tokens_map.json": json.dumps({"eos_token": {"content": "<|endoftext|>"}}).encode(),
        "added_tokens.json": b'{"<|user|>": 301}',
        "chat_template.jinja": TEMPLATE.encode(),
        "vocab.json": json.dumps(kept | {"<|endoftext|>": 300}).encode(),
        "merges.txt": ("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in left)).encode(),
    }


def tokenizer() -> list[bytes]:
    return [bytes((i,)) + content for i, content in enumerate(tokenizer_files().values())]
