"""What is in this checkpoint: which architecture, whose dialect, which config, and what each of these rests on.

The table that explains the most tensors wins; where two tables share their names (HuggingFace and nanoGPT) the shapes
of the non-square matrices decide. Names of files and folders are never asked.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoint import proof
from ..checkpoint.base import Checkpoint
from ..checkpoint.wording import few
from ..config import GPTConfig, from_gguf, from_hf, from_meta, from_nanogpt, from_openai, from_own
from ..config.families import FAMILIES
from ..errors import ConfigError, LoadstoneError, PlanError
from . import gpt2, gpt_neox, gptj, llama, own
from .facts import OtherFamilyError, infer_config, read_facts
from .plan import LoadPlan, make_plan, unwrap
from .rules import WeightMap

TABLES: tuple[WeightMap, ...] = gpt2.TABLES + gptj.TABLES + gpt_neox.TABLES + llama.TABLES + own.TABLES


@dataclass
class Identity:
    """A checkpoint that was recognised, with its plan.

    Attributes:
        checkpoint, weight_map, config, plan: the four together.
        config_source: the file or record that the config was read from, or that it was inferred from the shapes.
        assumed: values that nothing beside the weights told.
        tie_is_known: False if the head is stored and only comparing its bytes with the embedding's can tell whether
            the two are one.
        remarks: what else the user should know, one sentence each (the tokenizer disagrees with the model, say).
    """

    checkpoint: Checkpoint
    weight_map: WeightMap
    config: GPTConfig
    plan: LoadPlan
    config_source: str
    assumed: list[str] = field(default_factory=list)
    tie_is_known: bool = True
    remarks: list[str] = field(default_factory=list)


def identify(
    checkpoint: Checkpoint,
    *,
    dialect: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    ignore: Iterable[str] = (),
    ignore_config: Iterable[str] = (),
) -> Identity:
    """Recognise a checkpoint from its header, find its config, and plan its load.

    Args:
        checkpoint: an open container.
        dialect: name of a table (`hf`, or `gpt2/hf`), to insist on one.
        overrides: config fields that the caller knows better.
        ignore: tensors that the caller gives up, by exact name.
        ignore_config: config fields that the caller knows to be harmless.

    Raises PlanError if no table fits the names, ConfigError if the config is unusable. The plan itself may have
    problems: ask `plan.require_clean`.
    """
    tables = [t for t in TABLES if dialect in (None, t.dialect, t.name)]
    if not tables:
        raise PlanError(f"no dialect is called {dialect!r}; known: {', '.join(dict.fromkeys(t.name for t in TABLES))}.")
    best: Identity | None = None
    failure: LoadstoneError | None = None
    other: OtherFamilyError | None = None  # several families have the same names
    for table in _by_names(checkpoint, tables):
        try:
            found = _with_table(checkpoint, table, overrides or {}, tuple(ignore), tuple(ignore_config))
        except OtherFamilyError as error:
            other = other or error
            continue
        except LoadstoneError as error:
            failure = failure or error
            continue
        if best is None or _faults(found.plan) < _faults(best.plan):
            best = found
        if found.plan.clean:
            break
    if best is None or (failure and not best.plan.clean):
        # A config that is refused must not be hidden behind a dialect of the same names whose plan has problems.
        raise failure or other or PlanError(_unknown_names(checkpoint, dialect))
    return best


def _faults(plan: LoadPlan) -> int:
    return len(plan.mismatched) + len(plan.missing) + len(plan.unused) + len(plan.doubled)


def _by_names(checkpoint: Checkpoint, tables: Iterable[WeightMap]) -> list[WeightMap]:
    """The tables that explain the most names; several only if they share their names."""
    scores = []
    bare = {unwrap(name)[0] for name in checkpoint.tensors}
    for table in tables:
        stems = {table.synonyms.get(stem, stem) for stem in bare} if table.synonyms else bare
        layers = table.count_layers(stems)
        claimed = {rule.source for rule in table.expand(layers, table.count_experts(stems))} & stems
        if layers and claimed:
            scores.append((len(claimed), table))
    most = max((score for score, _ in scores), default=0)
    return [table for score, table in scores if score == most]


def _unknown_names(checkpoint: Checkpoint, dialect: str | None) -> str:
    names = list(checkpoint.tensors)
    if dialect and (others := _by_names(checkpoint, TABLES)):
        names_of = dict.fromkeys(table.name for table in others)
        return f"{checkpoint.path}: the names are not {dialect}'s; they are those of {few(names_of)}."
    if any(".lora_A." in name or name.endswith(".lora_a") for name in names):
        return (
            f"{checkpoint.path}: a LoRA adapter, which only changes a base model. Merge it into its base first, "
            "`loadstone merge BASE ADAPTER DST`, and load the result."
        )
    shown = ", ".join(names[:3]) if names else "none at all"
    return (
        f"{checkpoint.path}: the {len(names)} tensor names ({shown}{', ...' if len(names) > 3 else ''}) belong to no "
        f"known dialect of {', '.join(FAMILIES)}. Is this a checkpoint of such a model? "
        "`loadstone inspect --tensors` lists them; CONTRIBUTING.md shows how a dialect is added."
    )


def _with_table(
    checkpoint: Checkpoint,
    table: WeightMap,
    overrides: Mapping[str, Any],
    ignore: tuple[str, ...],
    ignore_config: tuple[str, ...],
) -> Identity:
    shapes = {unwrap(name, table)[0]: info.shape for name, info in checkpoint.tensors.items() if name not in ignore}
    try:
        facts = read_facts(table, shapes)
    except ConfigError as error:
        raise ConfigError(f"{checkpoint.path}: {error}") from None
    one_storage = _is_one_storage(checkpoint, table)
    twice = not facts["tied"] and not one_storage
    facts["tied"] = not twice
    config, source, assumed = _find_config(checkpoint, table, facts, ignore_config)
    if config.architecture != table.architecture:
        raise OtherFamilyError(
            f"{checkpoint.path}: {source} describes a {config.architecture} model, but the tensors are named as in "
            f"{table.name}. One of the two belongs to another model."
        )
    if one_storage:
        config = config.with_overrides({"tied": True})
    config = config.with_overrides(overrides)
    if config.n_layers > len(checkpoint.tensors):
        raise ConfigError(
            f"{checkpoint.path}: {source} says {config.n_layers:,} layers, but the file has only "
            f"{len(checkpoint.tensors):,} tensors. One of the two belongs to another model."
        )
    plan = make_plan(config, checkpoint.tensors, table, aliases=checkpoint.aliases, ignore=ignore)
    known = not twice or source in SAYS_WHETHER_TIED or "tied" in overrides
    assumed = [line for line in assumed if line.split(" ")[0] not in overrides]
    return Identity(checkpoint, table, config, plan, source, assumed, known)


def _is_one_storage(checkpoint: Checkpoint, table: WeightMap) -> bool:
    """Whether the file itself records head and embedding as the same bytes."""
    pair = {table.source_of("head.weight"), table.source_of("tok_emb.weight")}
    return any({unwrap(alias, table)[0], unwrap(name, table)[0]} == pair for alias, name in checkpoint.aliases.items())


def _find_config(
    checkpoint: Checkpoint, table: WeightMap, facts: Mapping[str, Any], ignore: tuple[str, ...]
) -> tuple[GPTConfig, str, list[str]]:
    """(config, where it was read, what was assumed): the dialect's own record first, shapes last."""
    metadata = checkpoint.metadata
    if isinstance(own := metadata.get("config"), GPTConfig):
        return own, THE_MODEL, []
    if table.dialect == "gguf":
        factors, where = _rope_factors(checkpoint), f"{checkpoint.path}"
        return from_gguf(metadata, facts, rope_factors=factors, where=where, ignore=ignore), "GGUF metadata", []
    if table.dialect == "openai" and "hparams" in metadata:
        return from_openai(metadata["hparams"], f"{checkpoint.folder}/hparams.json", ignore), "hparams.json", []
    if table.dialect in WITHOUT_CONFIG and (certified := _certified(checkpoint, table)):
        return certified, proof.NAME, []
    arguments = metadata.get("model_args")
    if isinstance(arguments, Mapping):
        if table.dialect == "nanogpt":
            return from_nanogpt(arguments, f"{checkpoint.path}: model_args", ignore), "model_args in the checkpoint", []
        if table.dialect == "meta":
            return (
                from_meta(arguments, facts, f"{checkpoint.path}: model_args", ignore),
                "model_args in the checkpoint",
                [],
            )
    if table.dialect == "meta" and (values := _beside(checkpoint, "params.json")):
        config = from_meta(values, facts, f"{checkpoint.folder}/params.json", ignore)
        return config, "params.json", [f"context_length = {config.context_length} (params.json does not record it)"]
    if table.dialect == "hf" and "hf_config" in metadata:
        return from_hf(metadata["hf_config"], "the module's config", ignore), "config.json", []
    if table.dialect == "hf" and (values := _beside(checkpoint, "config.json")):
        return from_hf(values, f"{checkpoint.folder}/config.json", ignore), "config.json", []
    config, assumed = infer_config(table, facts)
    return config, INFERRED, assumed


INFERRED, THE_MODEL = "the tensors' shapes (inferred)", "the model itself"
SAYS_WHETHER_TIED = ("config.json", THE_MODEL, proof.NAME)
_TEXT = 1_000_000  # bytes of what counts as one
# Dialects whose own files do not hold the whole config (model_args lack the activation); certificates do.
WITHOUT_CONFIG = ("raschka", "nanogpt", "lesson", "meta", "loadstone")
ROPE_FREQS = "rope_freqs.weight"


def _rope_factors(checkpoint: Checkpoint) -> tuple[float, ...]:
    """Llama 3's rotary scaling, which its GGUF converter writes as a tensor."""
    if ROPE_FREQS not in checkpoint.tensors:
        return ()
    if len(shape := checkpoint.info(ROPE_FREQS).shape) != 1:
        raise ConfigError(f"{checkpoint.path}: {ROPE_FREQS} should be a vector, found {list(shape)}.")
    return tuple(float(factor) for factor in checkpoint.read(ROPE_FREQS))


def _certified(checkpoint: Checkpoint, table: WeightMap) -> GPTConfig | None:
    """The config in a conversion's certificate, if that is about these very files. Raises FormatError if damaged."""
    folder = checkpoint.folder
    for file in (proof.beside(checkpoint.path), folder / proof.NAME) if folder else ():
        if file.is_file():
            values = proof.read(file)
            files, held = values["written"]["files"], {info.file for info in checkpoint.tensors.values() if info.file}
            # Of another family than the table's, it sends the search on to the right one.
            dialect = str(values["written"].get("dialect")).partition("/")[2]
            same = dialect == table.dialect and held <= files.keys()
            if same and all(_is_same(folder / name, entry) for name, entry in files.items()):
                return from_own(values["config"], str(file))
    return None


def _is_same(file: Path, entry: Mapping[str, Any]) -> bool:
    """By size, and texts (a config that somebody edited) by hash; `verify --certificate` compares all hashes."""
    if not file.is_file() or file.stat().st_size != entry["bytes"]:
        return False
    return entry["bytes"] > _TEXT or hashlib.sha256(file.read_bytes()).hexdigest() == entry["sha256"]


def _beside(checkpoint: Checkpoint, name: str) -> Mapping[str, Any] | None:
    """A JSON object lying beside the weights, if there is one. Raises ConfigError if it is broken."""
    file = checkpoint.folder / name if checkpoint.folder else None
    if file is None or not file.is_file():
        return None
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: it cannot be read ({error.strerror}). Check its permissions.") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: this is not valid JSON ({error}). Download it again.") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: expected a JSON object, found {type(values).__name__}.")
    return values
