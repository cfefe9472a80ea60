"""`Tokenizer`: text to token ids and back, for every kind of vocabulary; the BPE itself is HuggingFace's `tokenizers`.

Special text, the policy: what a user types is plain text. `encode("<|endoftext|>")` gives the ids of those characters,
never the end token, unless the caller says `parse_special=True`. Rendered chat templates are encoded so, because the
template writes the special tokens; a message that holds the text of a special token then becomes that token.
"""

from __future__ import annotations

import codecs
import operator
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from threading import Lock

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from ..errors import TokenizerError

# OpenAI's 1:1 map of bytes to printable characters (gpt-2/src/encoder.py): printable latin-1 stands for itself, the
# other 68 bytes are U+0100 and on, in order.
_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OTHERS = (byte for byte in range(256) if byte not in _PRINTABLE)
BYTE_OF: Mapping[str, int] = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(0x100 + i): byte for i, byte in enumerate(_OTHERS)
}
_FALLBACK_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


@contextmanager
def refusing(where: Path | str, what: str, hint: str = "") -> Iterator[None]:
    """Turn whatever the Rust library raises, its panics included, into a TokenizerError."""
    try:
        yield
    except TokenizerError:
        raise
    except BaseException as error:
        # A panic arrives as pyo3_runtime.PanicException, which is no Exception and cannot be imported.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise TokenizerError(f"{where}: {what} ({error}). {hint}".rstrip()) from None


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A vocabulary with its special tokens and chat template. Safe to share between threads.

    Attributes:
        backend: the Rust tokenizer.
        source: the file or place that it came from, for reports.
        bos_id: the token that begins a text, if there is one.
        eos_ids: generation must stop at any of these.
        pad_id: the padding token, if there is one.
        chat_template: Jinja source.
        special: the texts of the named special tokens (`bos_token`, `eos_token`, ...), as chat templates see them.
    """

    backend: Backend = field(repr=False)
    source: str
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None
    chat_template: str | None = None
    special: Mapping[str, str] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock, repr=False)

    def encode(
        self, text: str, *, add_special: bool = True, parse_special: bool = False, yielding: bool = False
    ) -> list[int]:
        """Token ids of a text.

        Args:
            text: any Unicode text; a lone surrogate is refused.
            add_special: add what the model expects around every text (a begin token, say), if anything.
            parse_special: the text of a special token becomes that token (see the top of this file).
            yielding: let other threads run meanwhile; the library's call for one text holds them up, a second per MB.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TokenizerError(
                f"The text holds U+{ord(text[error.start]):04X} at character {error.start}: a lone surrogate, which is "
                "not Unicode text. Decode the input as UTF-8 with errors='replace'."
            ) from None
        with refusing(self.source, "the text could not be encoded"), self._lock:
            self.backend.encode_special_tokens = not parse_special  # a property of the backend, hence the lock
            try:
                if yielding:
                    (found,) = self.backend.encode_batch_fast([text], add_special_tokens=add_special)
                else:
                    found = self.backend.encode(text, add_special_tokens=add_special)
                ids: list[int] = found.ids
            except Exception:
                if (char := self._without_token(text)) is None:
                    raise
                raise TokenizerError(
                    f"{self.source}: the text could not be encoded: it holds {char!r} (U+{ord(char):04X}), for which "
                    "this tokenizer has no token. Leave it out; a byte-level tokenizer has a token for everything."
                ) from None
        return ids

    def _without_token(self, text: str) -> str | None:
        for char in dict.fromkeys(text):
            try:
                self.backend.encode(char, add_special_tokens=False)
            except Exception:
                return char
        return None

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of token ids; bytes that are no UTF-8 become U+FFFD. Raises TokenizerError for an unknown id."""
        # The backend forgets to skip special tokens that are marked `normalized`, so they are left out here.
        shown = [token for token in map(self._known, ids) if not (skip_special and self.is_special(token))]
        with refusing(self.source, "the tokens could not be decoded"):
            text: str = self.backend.decode(shown, skip_special_tokens=False)
        return text

    def decode_stream(self, *, skip_special: bool = True) -> TextStream:
        """A decoder for tokens that arrive one by one, as the continuation of a text."""
        return TextStream(self, skip_special)

    @cached_property
    def vocab_size(self) -> int:
        """Highest id + 1, added tokens included: the embedding rows that the tokenizer can ask for."""
        return max(self._ids, default=-1) + 1

    def token_text(self, token: int) -> str:
        """The text that one token stands for; U+FFFD where it is a part of a character."""
        return self.token_bytes(token).decode(errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes that one token adds to a text."""
        token = self._known(token)
        if token in self._added:
            return self._added[token].content.encode()
        text = self.backend.id_to_token(token) or ""
        if "ByteLevel(" in self._decoder and all(char in BYTE_OF for char in text):
            return bytes(BYTE_OF[char] for char in text)
        if "ByteFallback(" in self._decoder and (found := _FALLBACK_BYTE.fullmatch(text)):
            return bytes.fromhex(found[1])
        # Decoders strip the space before the first word, so the token is decoded behind another one.
        with refusing(self.source, f"token {token} could not be decoded"):
            before: str = self.backend.decode(self._word)
            after: str = self.backend.decode([*self._word, token], skip_special_tokens=False)
        return after[len(before) :].encode()

    def is_special(self, token: int) -> bool:
        return token in self._added and self._added[token].special

    def apply_chat(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> str:
        """The conversation as the model was trained to see it; encode it with add_special=False, parse_special=True.

        Args:
            messages: `role` (system, user, assistant) and `content` of each.
            add_generation_prompt: end with the header of the assistant's next message.

        Raises:
            TokenizerError: there is no chat template, or it is broken, unsafe, or refuses these messages.
        """
        if self.chat_template is None:
            raise TokenizerError(
                f"{self.source}: there is no chat template, so this is no chat model, or its chat_template.jinja is "
                "missing. Give plain text."
            )
        from .chat import render  # Jinja takes a tenth of the time that a process needs to its first token

        return render(self.chat_template, messages, self.special, self.source, add_generation_prompt)

    def _known(self, token: int) -> int:
        token = operator.index(token)
        if token not in self._ids:
            raise TokenizerError(
                f"{self.source}: token {token} is not in the vocabulary of {len(self._ids)} tokens "
                f"(0 to {self.vocab_size - 1}). Was it made by another tokenizer?"
            )
        return token

    @cached_property
    def _ids(self) -> frozenset[int]:
        return frozenset(self.backend.get_vocab(with_added_tokens=True).values())

    @cached_property
    def _added(self) -> dict[int, AddedToken]:
        return dict(self.backend.get_added_tokens_decoder())

    @cached_property
    def _word(self) -> list[int]:
        return self.encode("a", add_special=False)

    @cached_property
    def _decoder(self) -> str:
        return repr(self.backend.decoder)


class TextStream:
    """Decodes tokens one by one; holds back the bytes of an unfinished character, so that no half one is shown.

    As the continuation of a text: a space before the first word stays.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool) -> None:
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that can be shown now that `token` is there; often empty. Raises TokenizerError as `decode`."""
        if self._skip_special and self._tokenizer.is_special(token):
            return ""
        return self._utf8.decode(self._tokenizer.token_bytes(token))

    def flush(self) -> str:
        """At the end: U+FFFD if a character was left unfinished. The stream can then be used again."""
        return self._utf8.decode(b"", final=True)


def check_tokenizer(
    tokenizer: Tokenizer, *, vocab_size: int, eos_ids: Iterable[int] = (), bos_id: int | None = None
) -> list[str]:
    """What model and tokenizer disagree about, as sentences; empty if all agrees.

    Args:
        tokenizer: the tokenizer that is to be used with the model.
        vocab_size: rows of the model's token embedding.
        eos_ids: the end tokens of the model's configuration, where it names any.
        bos_id: its begin token, where it names one.

    Raises:
        TokenizerError: the tokenizer has more tokens than the model has rows: it belongs to another model.
    """
    known, highest = len(tokenizer._ids), tokenizer.vocab_size
    if highest > vocab_size:
        raise TokenizerError(
            f"{tokenizer.source}: the tokenizer has tokens up to id {highest - 1} ({highest} rows), and the model only "
            f"{vocab_size} rows: it is another model's. Put the model's own tokenizer files beside its weights."
        )
    notes = []
    if highest < vocab_size:
        more = "1 more row" if vocab_size - highest == 1 else f"{vocab_size - highest} more rows"
        notes.append(
            f"the model has {more} ({vocab_size}) than the tokenizer has tokens ({highest}): they are padding and are "
            "never sampled"
        )
    if known < highest:
        missing = [str(token) for token in range(highest) if token not in tokenizer._ids]
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        notes.append(f"{len(missing)} ids below the tokenizer's highest have no token: {shown}")
    unnamed = [_named(tokenizer, token) for token in eos_ids if token not in tokenizer.eos_ids]
    if unnamed:
        ends = " or ".join(_named(tokenizer, token) for token in tokenizer.eos_ids) or "no token"
        notes.append(f"the model's config ends a text at {' or '.join(unnamed)}, the tokenizer at {ends}")
    if bos_id is not None and bos_id != tokenizer.bos_id:
        begins = "no token" if tokenizer.bos_id is None else _named(tokenizer, tokenizer.bos_id)
        notes.append(f"the model's config begins a text with {_named(tokenizer, bos_id)}, the tokenizer with {begins}")
    return notes


def _named(tokenizer: Tokenizer, token: int) -> str:
    return f"token {token} ({tokenizer.token_text(token)!r})" if token in tokenizer._ids else f"token {token} (unknown)"
