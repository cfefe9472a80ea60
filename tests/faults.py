"""Faults that bad converters make, planted into files and configs of three families, each with what must be found.

The reference is always the sound model; what is planted lies in the file (its tensors) or in what is said of it (its
config). `expected` is what a right diagnosis names, in the order of execution: (point, repair).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import dialects
from loadstone.load import open_source
from loadstone.weightmap import Identity
from memory import MemoryCheckpoint

Tensors = dialects.Tensors
Plant = Callable[[Tensors], Tensors]
LAYERS = range(3)

GPT2 = dialects.gpt2_hf(context=72)
META = dialects.llama_meta()
NEOX = dialects.gpt_neox_hf()
SOUND: Mapping[str, Tensors] = {
    "gpt2/hf": GPT2,
    "gpt2/raschka": dialects.gpt2_raschka(GPT2, masks=False),
    "gpt2/nanogpt": dialects.gpt2_nanogpt(GPT2),
    "llama/hf": dialects.llama_hf(META, heads=6, kv_heads=2),
    "llama/meta": META,
    "gpt_neox/hf": NEOX,
}
LLAMA_CONFIG = {"n_heads": 6, "head_dim": 8, "n_kv_heads": 2, "context_length": 72}
CONFIGS: Mapping[str, dict[str, Any]] = {
    "gpt2": {"n_heads": 4, "activation": "gelu_tanh"},
    "llama": LLAMA_CONFIG,
    "gpt_neox": {"n_heads": 4, "head_dim": 12, "rope": {"dims": 4}, "context_length": 72},
}


def opened(dialect: str, tensors: Tensors | None = None, **config: Any) -> Identity:
    """A model in memory, as a source; `config` is what is wrongly said of it."""
    family = dialect.partition("/")[0]
    checkpoint = MemoryCheckpoint(SOUND[dialect] if tensors is None else tensors)
    return open_source(checkpoint, dialect=dialect, config=CONFIGS[family] | config)


@dataclass(frozen=True)
class Fault:
    """`plant` changes the file's tensors, `config` what is said of them; `reference` is the sound model's config."""

    dialect: str
    expected: tuple[tuple[str, str], ...]
    plant: Plant = lambda w: w
    config: Mapping[str, Any] = field(default_factory=dict)
    reference: Mapping[str, Any] = field(default_factory=dict)
    mended: bool = True

    def subject(self) -> Identity:
        return opened(self.dialect, self.plant(dict(SOUND[self.dialect])), **(dict(self.reference) | dict(self.config)))

    def sound(self) -> Identity:
        return opened(self.dialect, **self.reference)


def changed(change: Callable[[Any], Any], *names: str) -> Plant:
    """The same change to each of these tensors."""

    def plant(w: Tensors) -> Tensors:
        assert set(names) <= set(w), set(names) - set(w)
        return w | {name: np.ascontiguousarray(change(w[name])) for name in names}

    return plant


def swapped(*pairs: tuple[str, str]) -> Plant:
    """Exchange tensors; a name without `.weight` or `.bias` stands for both, as far as they are there."""

    def plant(w: Tensors) -> Tensors:
        found = dict(w)
        for a, b in pairs:
            leaves = [leaf for leaf in ("", ".weight", ".bias") if a + leaf in w]
            assert leaves, a
            for leaf in leaves:
                found[a + leaf], found[b + leaf] = found[b + leaf], found[a + leaf]
        return found

    return plant


def both(*plants: Plant) -> Plant:
    def plant(w: Tensors) -> Tensors:
        for each in plants:
            w = each(w)
        return w

    return plant


def everywhere(template: str) -> list[str]:
    return [template.format(i) for i in LAYERS]


def at_all(part: str, repair: str) -> tuple[tuple[str, str], ...]:
    return tuple((f"blocks.{i}.{part}", repair) for i in LAYERS)


def once(point: str, repair: str) -> tuple[tuple[str, str], ...]:
    return ((point, repair),)


def thirds(order: tuple[int, ...], axis: int) -> Callable[[Any], Any]:
    return lambda a: np.concatenate(
        [np.split(a, 3, axis=axis if a.ndim > 1 else 0)[i] for i in order], axis=axis if a.ndim > 1 else 0
    )


def heads_side_by_side(heads: int) -> Callable[[Any], Any]:
    """[q k v] along the last axis -> [q_0 k_0 v_0 q_1 ...]."""

    def change(a: Any) -> Any:
        cut = a.reshape(*a.shape[:-1], 3, heads, -1)
        return np.swapaxes(cut, -2, -3).reshape(a.shape)

    return change


def pairs(heads: int, turned: int = 0) -> Callable[[Any], Any]:
    """Rows of each head from rotary halves to rotary pairs."""

    def change(a: Any) -> Any:
        cut = a.reshape(heads, -1, *a.shape[1:])
        n = turned or cut.shape[1]
        first = np.swapaxes(cut[:, :n].reshape(heads, 2, n // 2, *a.shape[1:]), 1, 2).reshape(heads, n, *a.shape[1:])
        return np.concatenate([first, cut[:, n:]], axis=1).reshape(a.shape)

    return change


def of_fused(change: Callable[[Any], Any], heads: int, parts: str) -> Callable[[Any], Any]:
    """Change the q or k rows inside GPT-NeoX's query_key_value."""

    def apply(a: Any) -> Any:
        cut = a.reshape(heads, 3, -1, *a.shape[1:]).copy()
        for part in parts:
            own = cut[:, "qkv".index(part)]
            cut[:, "qkv".index(part)] = change(own.reshape(-1, *a.shape[1:])).reshape(own.shape)
        return cut.reshape(a.shape)

    return apply


def through(dtype: Any) -> Plant:
    return lambda w: {name: a.astype(dtype).astype(np.float32) for name, a in w.items()}


def element(value: float, *place: int) -> Callable[[Any], Any]:
    def change(a: Any) -> Any:
        a = a.copy()
        a[place] = value
        return a

    return change


def zeroed(a: Any) -> Any:
    return np.zeros_like(a)


def tiled(w: Tensors) -> Tensors:
    """Key/value heads copied for every query head, in the wrong order: tiled, not repeated."""
    names = [f"model.layers.{i}.self_attn.{p}_proj.weight" for i in LAYERS for p in "kv"]
    return w | {name: np.tile(w[name], (3, 1)) for name in names}


def repeated(w: Tensors) -> Tensors:
    """The same, right: a sound model."""
    names = [f"model.layers.{i}.self_attn.{p}_proj.weight" for i in LAYERS for p in "kv"]
    return w | {name: np.repeat(w[name].reshape(2, 8, -1), 3, axis=0).reshape(48, -1) for name in names}


def noise(*shape: int) -> Any:
    return np.random.default_rng(9).standard_normal(shape, dtype=np.float32) * np.float32(0.2)


H, R, L, N = "h.{}", "trf_blocks.{}", "model.layers.{}", "gpt_neox.layers.{}"
C_ATTN = [f"h.{i}.attn.c_attn.{leaf}" for i in LAYERS for leaf in ("weight", "bias")]
QKV_ROWS = [f"gpt_neox.layers.{i}.attention.query_key_value.{leaf}" for i in LAYERS for leaf in ("weight", "bias")]
Q_PROJ, K_PROJ = (everywhere(f"{L}.self_attn.{p}_proj.weight") for p in "qk")
LLAMA3 = {"theta": 10000.0, "scaling": "llama3", "factor": 8.0, "original_context": 20}
ROTARY = tuple(
    x for i in LAYERS for x in ((f"blocks.{i}.attn.q", "rotary layout"), (f"blocks.{i}.attn.k", "rotary layout"))
)
BLOCK_1_2 = [
    (f"h.1.{name}", f"h.2.{name}") for name in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
]

FAULTS: dict[str, Fault] = {
    # GPT-2
    "gpt2: one square matrix transposed": Fault(
        "gpt2/hf", once("blocks.2.attn.out", "transpose"), changed(np.transpose, "h.2.attn.c_proj.weight")
    ),
    "gpt2: square matrices of all layers transposed": Fault(
        "gpt2/hf", at_all("attn.out", "transpose"), changed(np.transpose, *everywhere("h.{}.attn.c_proj.weight"))
    ),
    "gpt2: reshaped instead of transposed": Fault(
        "gpt2/hf", once("blocks.1.mlp.up", "reshape"), changed(lambda a: a.T.reshape(a.shape), "h.1.mlp.c_fc.weight")
    ),
    "gpt2: fused matrix reshaped instead of transposed": Fault(
        "gpt2/hf", once("blocks.0.attn.q", "reshape"), changed(lambda a: a.T.reshape(a.shape), "h.0.attn.c_attn.weight")
    ),
    "gpt2: q and k exchanged": Fault("gpt2/hf", at_all("attn.q", "qkv order"), changed(thirds((1, 0, 2), 1), *C_ATTN)),
    "gpt2: stored as v, q, k": Fault("gpt2/hf", at_all("attn.q", "qkv order"), changed(thirds((2, 0, 1), 1), *C_ATTN)),
    "gpt2: stored head by head": Fault(
        "gpt2/hf", at_all("attn.q", "qkv interleave"), changed(heads_side_by_side(4), *C_ATTN)
    ),
    "gpt2: erf instead of tanh": Fault(
        "gpt2/hf", once("blocks.0.mlp.hidden", "activation"), config={"activation": "gelu"}
    ),
    "gpt2: norm epsilon": Fault("gpt2/hf", once("blocks.0.norm1", "norm epsilon"), config={"norm_eps": 1e-12}),
    "gpt2: unusual norm epsilon": Fault(
        "gpt2/hf", once("blocks.0.norm1", "norm epsilon"), reference={"norm_eps": 3.7e-4}, config={"norm_eps": 1e-5}
    ),
    "gpt2: norm of the wrong kind": Fault("gpt2/hf", once("blocks.0.norm1", "norm kind"), config={"norm": "rmsnorm"}),
    "gpt2: ln_1 and ln_2 exchanged": Fault(
        "gpt2/hf", at_all("norm1", "exchanged norms"), swapped(*((f"h.{i}.ln_1", f"h.{i}.ln_2") for i in LAYERS))
    ),
    "gpt2: ln_f exchanged with a block's": Fault(
        "gpt2/hf", once("blocks.2.norm2", "exchanged norms"), swapped(("ln_f", "h.2.ln_2"))
    ),
    "gpt2: bias of one projection lost": Fault(
        "gpt2/hf", once("blocks.1.mlp.down", "bias"), changed(zeroed, "h.1.mlp.c_proj.bias")
    ),
    "gpt2: biases of q, k, v lost": Fault(
        "gpt2/hf", tuple((f"blocks.0.attn.{p}", "bias") for p in "qkv"), changed(zeroed, "h.0.attn.c_attn.bias")
    ),
    "gpt2: ln_f.bias lost": Fault("gpt2/hf", once("norm", "bias"), changed(zeroed, "ln_f.bias")),
    "gpt2: biases exchanged": Fault(
        "gpt2/hf",
        once("blocks.1.attn.out", "exchanged tensors"),
        swapped(("h.1.attn.c_proj.bias", "h.1.mlp.c_proj.bias")),
    ),
    "gpt2: layers exchanged": Fault("gpt2/hf", once("blocks.1.norm1", "exchanged layers"), swapped(*BLOCK_1_2)),
    "gpt2: one tensor of two layers exchanged": Fault(
        "gpt2/hf", once("blocks.0.mlp.up", "exchanged tensors"), swapped(("h.0.mlp.c_fc", "h.2.mlp.c_fc"))
    ),
    "gpt2: one tensor written twice": Fault(
        "gpt2/hf",
        once("blocks.2.mlp.down", "copy"),
        lambda w: w | {"h.2.mlp.c_proj.weight": w["h.1.mlp.c_proj.weight"]},
        mended=False,
    ),
    "gpt2: positions off by one": Fault(
        "gpt2/hf",
        once("embedding", "position offset"),
        changed(lambda a: np.concatenate([a[1:], a[:1] * 0]), "wpe.weight"),
    ),
    "gpt2: positions off by two": Fault(
        "gpt2/hf", once("embedding", "position offset"), changed(lambda a: np.roll(a, 2, 0), "wpe.weight")
    ),
    "gpt2: tie broken": Fault(
        "gpt2/hf", once("logits", "tie"), lambda w: w | {"lm_head.weight": noise(101, 32)}, config={"tied": False}
    ),
    "gpt2: head count": Fault("gpt2/hf", once("blocks.0.attn.context", "head count"), config={"n_heads": 8}),
    "gpt2: token rows shifted": Fault(
        "gpt2/hf",
        once("embedding", "vocabulary rows"),
        changed(lambda a: np.concatenate([a[:60], a[60:61] * 0, a[60:]]), "wte.weight"),
    ),
    "gpt2: padding put first": Fault(
        "gpt2/hf", once("embedding", "vocabulary rows"), changed(lambda a: np.concatenate([a[:3] * 0, a]), "wte.weight")
    ),
    "gpt2: last rows exchanged": Fault(
        "gpt2/hf",
        once("logits", "vocabulary rows"),
        changed(lambda a: a[[*range(95), 96, 95, *range(97, 101)]], "wte.weight"),
    ),
    "gpt2: rounded through float16": Fault(
        "gpt2/hf", once("embedding", "precision"), through(np.float16), mended=False
    ),
    "gpt2: one damaged element": Fault(
        "gpt2/hf", once("blocks.1.mlp.up", "damage"), changed(element(3.5, 7, 100), "h.1.mlp.c_fc.weight")
    ),
    "gpt2: one damaged norm": Fault(
        "gpt2/hf", once("blocks.1.norm2", "damage"), changed(element(3.5, 7), "h.1.ln_2.weight")
    ),
    "gpt2: one damaged embedding": Fault(
        "gpt2/hf", once("embedding", "vocabulary rows"), changed(element(3.5, 55, 3), "wte.weight")
    ),
    "gpt2: two modules at once": Fault(
        "gpt2/hf",
        (("blocks.0.attn.out", "transpose"), ("blocks.0.mlp.hidden", "activation")),
        changed(np.transpose, "h.0.attn.c_proj.weight"),
        config={"activation": "gelu"},
    ),
    "gpt2: four modules at once": Fault(
        "gpt2/hf",
        (
            ("blocks.0.norm1", "exchanged norms"),
            ("blocks.1.attn.q", "qkv order"),
            ("blocks.2.attn.out", "transpose"),
            ("blocks.2.mlp.down", "bias"),
        ),
        both(
            swapped(("h.0.ln_1", "h.0.ln_2")),
            changed(thirds((1, 0, 2), 1), "h.1.attn.c_attn.weight", "h.1.attn.c_attn.bias"),
            changed(np.transpose, "h.2.attn.c_proj.weight"),
            changed(zeroed, "h.2.mlp.c_proj.bias"),
        ),
    ),
    "gpt2: two in one module": Fault(
        "gpt2/raschka",
        (("blocks.1.attn.q", "qkv order"), ("blocks.1.attn.q", "transpose"), ("blocks.1.attn.k", "transpose")),
        both(
            changed(np.transpose, "trf_blocks.1.att.W_query.weight", "trf_blocks.1.att.W_key.weight"),
            swapped(("trf_blocks.1.att.W_query", "trf_blocks.1.att.W_key")),
        ),
    ),
    "gpt2: transposed and its bias lost": Fault(
        "gpt2/nanogpt",
        (("blocks.1.attn.out", "transpose"), ("blocks.1.attn.out", "bias")),
        both(
            changed(np.transpose, "transformer.h.1.attn.c_proj.weight"),
            changed(zeroed, "transformer.h.1.attn.c_proj.bias"),
        ),
    ),
    # Llama
    "llama: rotary pairs left as they are": Fault(
        "llama/hf", ROTARY, both(changed(pairs(6), *Q_PROJ), changed(pairs(2), *K_PROJ))
    ),
    "llama: rotary halves in Meta's names": Fault(
        "llama/meta",
        ROTARY,
        lambda w: (
            w
            | {
                f"layers.{i}.attention.w{p}.weight": SOUND["llama/hf"][f"model.layers.{i}.self_attn.{p}_proj.weight"]
                for i in LAYERS
                for p in "qk"
            }
        ),
    ),
    "llama: only q permuted": Fault("llama/hf", at_all("attn.q", "rotary layout"), changed(pairs(6), *Q_PROJ)),
    "llama: rotary theta": Fault(
        "llama/hf",
        once("blocks.0.attn.context", "rotary theta"),
        reference={"rope": {"theta": 5e5}},
        config={"rope": {"theta": 1e4}},
    ),
    "llama: unusual rotary theta": Fault(
        "llama/hf",
        once("blocks.0.attn.context", "rotary theta"),
        reference={"rope": {"theta": 23400.0}},
        config={"rope": {"theta": 1e4}},
    ),
    "llama: linear scaling lost": Fault(
        "llama/hf",
        once("blocks.0.attn.context", "rotary scaling"),
        reference={"rope": {"scaling": "linear", "factor": 4.0}},
        config={"rope": {}},
    ),
    "llama: llama3 scaling lost": Fault(
        "llama/hf", once("blocks.0.attn.context", "rotary scaling"), reference={"rope": LLAMA3}, config={"rope": {}}
    ),
    "llama: gate and up exchanged": Fault(
        "llama/hf",
        at_all("mlp.gate", "gate and up"),
        swapped(*((f"model.layers.{i}.mlp.gate_proj", f"model.layers.{i}.mlp.up_proj") for i in LAYERS)),
    ),
    "llama: gelu instead of silu": Fault(
        "llama/hf", once("blocks.0.mlp.hidden", "activation"), config={"activation": "gelu_tanh"}
    ),
    "llama: head count": Fault(
        "llama/hf", once("blocks.0.attn.context", "head count"), config={"n_heads": 3, "n_kv_heads": 1, "head_dim": 16}
    ),
    "llama: head count, with rotary pairs": Fault(
        "llama/meta", once("blocks.0.attn.q", "head count"), config={"n_heads": 3, "n_kv_heads": 1, "head_dim": 16}
    ),
    "llama: k and v exchanged": Fault(
        "llama/hf",
        once("blocks.1.attn.k", "qkv order"),
        swapped(("model.layers.1.self_attn.k_proj", "model.layers.1.self_attn.v_proj")),
    ),
    "llama: norm epsilon": Fault("llama/hf", once("blocks.0.norm1", "norm epsilon"), config={"norm_eps": 1e-6}),
    "llama: kv heads tiled": Fault(
        "llama/hf",
        tuple((f"blocks.{i}.attn.{p}", "head grouping") for i in LAYERS for p in "kv"),
        tiled,
        config={"n_kv_heads": 6},
    ),
    "llama: square matrix transposed": Fault(
        "llama/hf",
        once("blocks.1.attn.q", "transpose"),
        changed(np.transpose, "model.layers.1.self_attn.q_proj.weight"),
    ),
    "llama: norms as the difference from 1": Fault(
        "llama/hf",
        tuple((p, "norm plus one") for p in (*(f"blocks.{i}.{n}" for i in LAYERS for n in ("norm1", "norm2")), "norm")),
        lambda w: w | {name: a - 1 for name, a in w.items() if "norm" in name},
    ),
    "llama: embedding scaled": Fault(
        "llama/hf", once("embedding", "scale"), changed(lambda a: a * np.float32(48**0.5), "model.embed_tokens.weight")
    ),
    "llama: softmax scale folded into q": Fault(
        "llama/hf", at_all("attn.q", "scale"), changed(lambda a: a * np.float32(8**-0.5), *Q_PROJ)
    ),
    "llama: head replaced by the embedding": Fault(
        "llama/hf",
        once("logits", "tie"),
        lambda w: w | {"lm_head.weight": w["model.embed_tokens.weight"]},
        config={"tied": False},
        mended=False,
    ),
    "llama: rounded through bfloat16": Fault(
        "llama/hf", once("embedding", "precision"), through("bfloat16"), mended=False
    ),
    "llama: rotary layout and theta": Fault(
        "llama/hf",
        (
            ("blocks.0.attn.q", "rotary layout"),
            ("blocks.0.attn.k", "rotary layout"),
            ("blocks.0.attn.context", "rotary theta"),
        ),
        both(changed(pairs(6), Q_PROJ[0]), changed(pairs(2), K_PROJ[0])),
        reference={"rope": {"theta": 5e5}},
        config={"rope": {}},
    ),
    # GPT-NeoX
    "neox: sequential instead of parallel": Fault(
        "gpt_neox/hf", once("blocks.0.norm2", "parallel residual"), config={"parallel_residual": False}
    ),
    "neox: whole heads turned": Fault("gpt_neox/hf", once("blocks.0.attn.context", "rotary dims"), config={"rope": {}}),
    "neox: q, k, v one after the other": Fault(
        "gpt_neox/hf",
        at_all("attn.q", "qkv interleave"),
        changed(lambda a: np.swapaxes(a.reshape(4, 3, 12, *a.shape[1:]), 0, 1).reshape(a.shape), *QKV_ROWS),
    ),
    "neox: v, k, q inside each head": Fault(
        "gpt_neox/hf",
        at_all("attn.q", "qkv order"),
        changed(lambda a: a.reshape(4, 3, -1, *a.shape[1:])[:, ::-1].reshape(a.shape), *QKV_ROWS),
    ),
    "neox: rotary pairs": Fault("gpt_neox/hf", ROTARY, changed(of_fused(pairs(4, 4), 4, "qk"), *QKV_ROWS)),
    "neox: tanh instead of erf": Fault(
        "gpt_neox/hf", once("blocks.0.mlp.hidden", "activation"), config={"activation": "gelu_tanh"}
    ),
    "neox: bias lost": Fault(
        "gpt_neox/hf", once("blocks.2.mlp.down", "bias"), changed(zeroed, "gpt_neox.layers.2.mlp.dense_4h_to_h.bias")
    ),
    "neox: head count": Fault(
        "gpt_neox/hf", once("blocks.0.attn.q", "head count"), config={"n_heads": 8, "head_dim": 6}
    ),
    "neox: norms exchanged in one layer": Fault(
        "gpt_neox/hf",
        once("blocks.1.norm1", "exchanged norms"),
        swapped(("gpt_neox.layers.1.input_layernorm", "gpt_neox.layers.1.post_attention_layernorm")),
    ),
    "neox: rotary dims and theta": Fault(
        "gpt_neox/hf",
        (("blocks.0.attn.context", "rotary theta"), ("blocks.0.attn.context", "rotary dims")),
        reference={"rope": {"dims": 4, "theta": 5e5}},
        config={"rope": {"dims": 8}},
    ),
    "neox: dense transposed, sequential, tanh": Fault(
        "gpt_neox/hf",
        (
            ("blocks.0.norm2", "parallel residual"),
            ("blocks.0.mlp.hidden", "activation"),
            ("blocks.1.attn.out", "transpose"),
        ),
        changed(np.transpose, "gpt_neox.layers.1.attention.dense.weight"),
        config={"parallel_residual": False, "activation": "gelu_tanh"},
    ),
}
