"""Writes `dialects.md` from the tables themselves: `python docs/dialects.py > docs/dialects.md`."""

from __future__ import annotations

from collections.abc import Iterator

from loadstone.config.families import FAMILIES, LLAMA_FIELDS, SPARSE
from loadstone.weightmap import TABLES, WeightMap
from loadstone.weightmap.rules import Rule

INTRODUCTION = """# Families and dialects

*Made by `docs/dialects.py` from the tables in `config/families.py` and `weightmap/`; a test holds that it is current.*

A family is a row of `FAMILIES`, its weight tables, and a reader and a writer of its config. The model has no other
code for it. A dialect is one program's names and layout. Every dialect is read and written, so `loadstone convert` goes
from each to each of its family. Besides those below, every family has the dialect `loadstone`: the model's own names,
with the config in the certificate.
"""
REMARKS = """
## Remarks

- A config field that asks for something else than the model does is refused by its name: ALiBi, `rope_type: longrope`
  or `dynamic`, `logit_scale`, dense layers among sparse ones (`mlp_only_layers`, `decoder_sparse_step`), a window in
  some layers only (`max_window_layers`, `layer_types`), shared experts.
- Experts are stored one by one in the hub's files, and one upon the other in memory (transformers 5) and in GGUF. `hf`
  reads both and writes the files' way; GGUF's own early way (`blk.0.ffn_gate.3.weight`) is read too.
- llama.cpp calls Llama, Mistral and Mixtral all `llama`; a Mistral that was written as GGUF comes back as a Llama. Its
  graphs of these, of Qwen and of Phi-3 have no sliding window: a model whose window is shorter than its context is
  refused, unless you `--accept window`.
- llama.cpp computes GPT-NeoX with the tanh form of GELU, where the models were trained with the exact one: its logits
  differ by some 1e-3 of their size. Read from GGUF, a GPT-NeoX has the exact one.
- llama.cpp makes the weights of Qwen3-MoE's picked experts sum to 1; a model that does not (`norm_topk_prob: false`) is
  refused.
"""


def page() -> str:
    return "\n".join(
        [INTRODUCTION, *overview(), REMARKS.rstrip(), *(line for name in FAMILIES for line in family(name)), ""]
    )


def overview() -> Iterator[str]:
    yield "| family | models | dialects | in transformers | in llama.cpp | what makes it, apart from GPT-2 |"
    yield "|---|---|---|---|---|---|"
    for name, family in FAMILIES.items():
        dialects = ", ".join(f"`{table.dialect}`" for table in tables(name))
        like = "llama" if name != "llama" and LLAMA_FIELDS.keys() <= family.fields.keys() else ""
        known = LLAMA_FIELDS if like else {}
        differs = ["experts"] if name in SPARSE else []
        differs += [f"`{key}={value}`" for key, value in family.fields.items() if known.get(key) != value]
        fields = ", ".join(([f"as `{like}`"] if like else []) + differs) or "-"
        graph = f"`{family.gguf}`" if family.gguf else "no graph"
        yield f"| `{name}` | {family.models} | {dialects} | `{family.hf}` | {graph} | {fields} |"


def tables(architecture: str) -> list[WeightMap]:
    """One for each dialect, the one that is written."""
    found: dict[str, WeightMap] = {}
    for table in TABLES:
        if table.architecture == architecture and table.dialect != "loadstone":
            found.setdefault(table.dialect, table)
    return list(found.values())


def family(name: str) -> Iterator[str]:
    """Every weight in every dialect; what is done to it on the way in. Biases lie beside their weights."""
    found = tables(name)
    yield f"\n## {name}\n"
    yield "| parameter | " + " | ".join(f"`{table.dialect}`" for table in found) + " |"
    yield "|---" * (1 + len(found)) + "|"
    targets = dict.fromkeys(t for table in found for rule in table.rules for t in rule.target if t.endswith("weight"))
    for target in targets:
        cells = (cell(table, rule) for table in found for rule in [rule_of(table, target)])
        yield f"| `{target}` | " + " | ".join(cells) + " |"


def rule_of(table: WeightMap, target: str) -> Rule | None:
    return next((rule for rule in table.rules if target in rule.target), None)


def cell(table: WeightMap, rule: Rule | None) -> str:
    if rule is None:
        return "-"
    ops = ", ".join(op.label for op in rule.ops)
    return f"`{table.written_name(rule)}`" + (f" ({ops})" if ops else "")


if __name__ == "__main__":
    print(page(), end="")
