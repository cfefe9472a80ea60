"""Tokenizers that lie in a model's folder: tokenizer.json, vocab.json + merges.txt, encoder.json + vocab.bpe."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, pre_tokenizers

from ..checkpoint.wording import shown
from ..errors import TokenizerError
from .base import Tokenizer, refusing
from .bpe import Merge, add_tokens, build_bpe, surround

END_OF_TEXT = "<|endoftext|>"
BPE_PAIRS = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))  # HuggingFace's and OpenAI's names
# vocab.json + merges.txt do not say how a text is cut into words; these classes of transformers cut as GPT-2 does.
CUT_AS_GPT2 = frozenset({"GPT2Tokenizer", "GPT2TokenizerFast", "CodeGenTokenizer", "CodeGenTokenizerFast"})
NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_ID = re.compile(r"[0-9]{1,9}")
_DAMAGED = "Download it again; what lies there may be cut short, a web page or a Git LFS pointer."


def from_folder(folder: Path) -> Tokenizer | None:
    """The tokenizer of a HuggingFace or OpenAI folder, or None if none lies there.

    Raises TokenizerError if one is damaged, or there is only SentencePiece's or tiktoken's `tokenizer.model`.
    """
    path = folder / "tokenizer.json"
    if path.is_file():
        return _finish(folder, _read_backend(path), str(path))
    for vocab, merges in BPE_PAIRS:
        if (folder / vocab).is_file() and (folder / merges).is_file():
            return _from_pair(folder, folder / vocab, folder / merges)
    if (folder / "tokenizer.model").is_file():
        raise TokenizerError(
            f"{folder / 'tokenizer.model'}: this format is not read. Get tokenizer.json from the model's page, or "
            "convert it: transformers.AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)."
        )
    return None


def gpt2_backend(vocab_path: Path, merges_path: Path, *, add_prefix_space: bool = False) -> Backend:
    """GPT-2's byte-level BPE over a vocabulary and its merges (openai/gpt-2, src/encoder.py)."""
    vocab = read_json(vocab_path)
    backend = build_bpe(vocab_path, vocab, read_merges(merges_path))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    backend.decoder = decoders.ByteLevel()
    if END_OF_TEXT in vocab:
        add_tokens(backend, [END_OF_TEXT], special=True)
    return backend


def gpt2_special(backend: Backend) -> dict[str, str]:
    """GPT-2's one special token begins and ends a text; its own folder does not say so."""
    known = backend.token_to_id(END_OF_TEXT) is not None
    return dict.fromkeys(("bos_token", "eos_token"), END_OF_TEXT) if known else {}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises TokenizerError if the file is anything else."""
    try:
        raw = path.read_bytes()
        value = json.loads(raw)
        if b"\\ud" in raw.lower():  # JSON can spell half a surrogate pair, which no text can hold
            json.dumps(value, ensure_ascii=False).encode()
    except (OSError, ValueError, RecursionError) as error:
        raise TokenizerError(f"{path}: cannot be read as JSON ({error}). {_DAMAGED}") from None
    if not isinstance(value, dict):
        raise TokenizerError(f"{path}: holds a JSON {type(value).__name__}, and an object was expected. {_DAMAGED}")
    return value


def read_merges(path: Path) -> list[Merge]:
    """The merges of a merges.txt or vocab.bpe, in order of rank; the first line may be a `#version`."""
    lines = _read_text(path).split("\n")  # never splitlines(): it would also cut at characters that tokens hold
    merges = []
    for number, line in enumerate(lines, 1):
        parts = line.rstrip("\r").split(" ")
        if parts == [""] or (number == 1 and line.startswith("#version")):
            continue
        if len(parts) != 2 or not all(parts):
            raise TokenizerError(f"{path}: line {number} is {shown(line)}, and a merge is two tokens. {_DAMAGED}")
        merges.append((parts[0], parts[1]))
    return merges


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(f"{path}: cannot be read as UTF-8 text ({error}). {_DAMAGED}") from None


def _read_backend(path: Path) -> Backend:
    """A tokenizer.json. The library gives other ids than the file's without a word, so these are compared."""
    values = read_json(path)
    with refusing(path, "is no tokenizer that this version of `tokenizers` can read", _DAMAGED):
        backend = Backend.from_str(_read_text(path))
    owners: dict[int, str] = {}
    for token, number in backend.get_vocab(with_added_tokens=False).items():
        if (other := owners.setdefault(number, token)) != token:
            raise TokenizerError(f"{path}: tokens {shown(other)} and {shown(token)} both have id {number}. {_DAMAGED}")
    for added in values.get("added_tokens") or ():
        _check_id(path, backend, added["content"], added["id"])
    backend.no_truncation()  # left over from training in many files: would cut long texts without a word
    backend.no_padding()
    return backend


def _check_id(where: Path, backend: Backend, token: str, wanted: object) -> None:
    if (found := backend.token_to_id(token)) != wanted:
        raise TokenizerError(
            f"{where}: the added token {shown(token)} should have id {shown(wanted)} and gets {found}: ids before "
            "it are left out, or the files belong to different tokenizers."
        )


def _from_pair(folder: Path, vocab: Path, merges: Path) -> Tokenizer:
    config = _optional(folder / "tokenizer_config.json")
    kind = str(config.get("tokenizer_class", "GPT2Tokenizer"))
    if kind not in CUT_AS_GPT2:
        raise TokenizerError(
            f"{folder / 'tokenizer_config.json'}: {vocab.name} and {merges.name} belong to a {kind[:60]}, which "
            "does not cut a text into words as GPT-2 does; only tokenizer.json says how. Put that file there."
        )
    backend = gpt2_backend(vocab, merges, add_prefix_space=config.get("add_prefix_space") is True)
    return _finish(folder, backend, f"{vocab} + {merges.name}", special=gpt2_special(backend))


def _finish(
    folder: Path, backend: Backend, source: str, special: Mapping[str, str] = MappingProxyType({})
) -> Tokenizer:
    """Special tokens, end tokens and chat template, from the files beside the vocabulary; `special` are defaults."""
    config_path = folder / "tokenizer_config.json"
    config = _optional(config_path)
    special = {**special, **_named(_optional(folder / "special_tokens_map.json")), **_named(config)}
    _add_missing(folder, backend, config)
    ids = {name: number for name, text in special.items() if (number := backend.token_to_id(text)) is not None}
    known = backend.get_added_tokens_decoder()
    add_tokens(backend, [special[name] for name, number in ids.items() if number not in known], special=True)
    adds = [config.get(key) for key in ("add_bos_token", "add_eos_token")]
    if any(isinstance(flag, bool) for flag in adds):  # transformers 5: it then replaces tokenizer.json's own way
        before, after = ids.get("bos_token"), ids.get("eos_token")
        surround(backend, before if adds[0] is True else None, after if adds[1] is True else None)
    bos, eos, pad = ([ids[name]] if name in ids else [] for name in ("bos_token", "eos_token", "pad_token"))
    more_bos, more_eos, more_pad = _model_ids(folder)
    return Tokenizer(
        backend,
        source,
        bos_id=next(iter(bos + more_bos), None),
        eos_ids=tuple(dict.fromkeys(eos + more_eos)),
        pad_id=next(iter(pad + more_pad), None),
        chat_template=_chat_template(folder, config_path, config),
        special=special,
    )


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _named(values: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens that a tokenizer_config.json or special_tokens_map.json names, as text or as an object."""
    texts = {name: values.get(name) for name in NAMED}
    texts = {name: text.get("content") if isinstance(text, dict) else text for name, text in texts.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str) and text}


def _add_missing(folder: Path, backend: Backend, config: Mapping[str, Any]) -> None:
    """Added tokens that stand in added_tokens.json or tokenizer_config.json alone, at the ids that these name."""
    wanted = {text: (number, False) for text, number in _optional(folder / "added_tokens.json").items()}
    entries = config.get("added_tokens_decoder")
    for number, entry in entries.items() if isinstance(entries, dict) else ():
        if not isinstance(entry, dict) or not isinstance(entry.get("content"), str) or not _ID.fullmatch(number):
            raise TokenizerError(f"{folder / 'tokenizer_config.json'}: added_tokens_decoder holds {shown(entry)}.")
        wanted[entry["content"]] = (int(number), entry.get("special") is True)
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    for text, (number, special) in sorted(wanted.items(), key=lambda item: str(item[1][0]).zfill(10)):
        if text not in known:
            add_tokens(backend, [text], special=special)
        _check_id(folder, backend, text, number)


def _model_ids(folder: Path) -> tuple[list[int], list[int], list[int]]:
    """Begin, end and padding tokens of generation_config.json, which transformers makes of config.json if absent."""
    paths = (folder / name for name in ("generation_config.json", "config.json"))
    path = next((path for path in paths if path.is_file()), None)
    values = read_json(path) if path else {}
    bos, eos, pad = (_ids(path, values, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id"))
    return bos, eos, pad


def _ids(path: Path | None, values: Mapping[str, Any], key: str) -> list[int]:
    """A token id, or a list of them; -1 and null are used for none."""
    value = values.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(number, int) and not isinstance(number, bool) and number < 2**31 for number in ids):
        raise TokenizerError(f"{path}: {key} is {shown(value)}, and a token id or a list of them was expected.")
    return [number for number in ids if number >= 0]


def _chat_template(folder: Path, config_path: Path, config: Mapping[str, Any]) -> str | None:
    """chat_template.jinja, else the config's field: a text, or a list of named ones of which `default` counts."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return _read_text(path)
    value = config.get("chat_template")
    if isinstance(value, list):
        defaults = (entry for entry in value if isinstance(entry, dict) and entry.get("name") == "default")
        value = next(defaults, {}).get("template")
    if isinstance(value, str) or config.get("chat_template") is None:
        return value
    raise TokenizerError(
        f"{config_path}: chat_template holds neither a text nor a list with a template named `default`."
    )
