"""Instruction data: formats, exact masks for the templates of many families, hostile text, cuts, splits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from loadstone.data.batch import IGNORED, Sample, collate
from loadstone.data.prompts import ChatStyle, Message, PieceStyle, UnsuitedError, alpaca_template
from loadstone.data.prompts import alpaca as alpaca_style
from loadstone.data.sft import Instructions, load_instructions, read_conversations
from loadstone.errors import FormatError, LoadstoneError, SourceError, TokenizerError
from loadstone.tokenizer import Tokenizer, load_tokenizer
from small_vocabularies import TEXTS, byte_level, gguf_byte_level, gguf_sentencepiece

VOCAB, MERGES = byte_level()
END = "<|endoftext|>"
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = '<<SYS>>\n' + "
    "messages[0]['content'] + '\n<</SYS>>\n\n' %}{% else %}{% set rest = messages %}{% set system = '' %}{% endif %}"
    "{% for message in rest %}{% if message['role'] == 'user' %}"
    "{{ '<s>[INST] ' + (system if loop.first else '') + message['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'].strip() + ' </s>' }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + "
    "message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ '<s>' }}{% for message in messages %}{% set role = 'model' if message.role == 'assistant' else message.role %}"
    "{{ '<start_of_turn>' + role + '\n' + message.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
# As Qwen3: only the last answer has a place to think in, and the generation prompt does not say so.
QWEN3 = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content.split('</think>')[-1] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Mistral's later ones: the system message stands with the last user's.
MISTRAL = (
    "{{ '<s>' }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' }}"
    "{% if loop.index0 == messages | length - 2 or loop.last %}{{ messages[0].content + '\n\n' }}{% endif %}"
    "{{ m.content + '[/INST]' }}{% elif m.role == 'assistant' %}{{ ' ' + m.content + '</s>' }}{% endif %}{% endfor %}"
)
PLAIN_WORDS = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}" + (
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
# template, how an answer reads with all that belongs to it
TEMPLATES = {
    "chatml": (CHATML, "{}<|im_end|>"),
    "llama2": (LLAMA2, " {} </s>"),
    "llama3": (LLAMA3, "{}<|eot_id|>"),
    "gemma": (GEMMA, "{}<end_of_turn>"),
    "words": (PLAIN_WORDS, "{}"),
}
SPECIAL = (
    "<|im_start|>", "<|im_end|>", "<s>", "</s>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>",
    "<start_of_turn>", "<end_of_turn>",
)  # fmt: skip
SYSTEM, HELLO, HI = Message("system", "Be brief."), Message("user", "Hello there"), Message("assistant", "Hi!")
MORE, BYE = Message("user", " And the 12 cats?"), Message("assistant", "The cats' bye.")


def tokenizer_with(template: str | None = None, end: str = END, **fields: Any) -> Tokenizer:
    """Byte-level, with the special tokens of all these templates."""
    made = load_tokenizer(None, gguf_byte_level(VOCAB, MERGES))
    assert made is not None
    made.backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    stop = made.backend.token_to_id(end)
    assert stop is not None
    return replace(made, chat_template=template, **({"eos_ids": (stop,)} | fields))


def answers_of(tokenizer: Tokenizer, ids: Sequence[int], answer: Sequence[bool]) -> list[str]:
    """The learnt stretches, as text."""
    found: list[list[int]] = []
    for token, before, learnt in zip(ids, [False, *answer], answer, strict=False):
        if learnt:
            found += [] if before else [[]]
            found[-1].append(token)
    return [tokenizer.decode(part, skip_special=False) for part in found]


def learnt(tokenizer: Tokenizer, sample: Sample) -> str:
    return tokenizer.decode([int(t) for t in sample.targets if t != IGNORED], skip_special=False)


def jsonl(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def alpaca(number: int, answer: str = "yes") -> dict[str, str]:
    return {"instruction": f"Question {number}?", "input": "", "output": answer}


# What is learnt, in every template


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("messages", [[HELLO, HI], [SYSTEM, HELLO, HI], [SYSTEM, HELLO, HI, MORE, BYE]])
def test_answers_and_their_ends_are_learnt_and_nothing_else(name: str, messages: list[Message]) -> None:
    template, form = TEMPLATES[name]
    tokenizer = tokenizer_with(template)
    ids, answer = ChatStyle(tokenizer)(messages)
    wanted = [form.format(m.content) for m in messages if m.role == "assistant"]
    assert answers_of(tokenizer, ids, answer) == wanted
    rendered = tokenizer.apply_chat(
        [{"role": m.role, "content": m.content} for m in messages], add_generation_prompt=False
    )
    assert tokenizer.decode(ids, skip_special=False) == rendered
    if name not in ("llama3", "words"):  # there the prompt's last white space joins, which it does not at inference
        assert ids == tokenizer.encode(rendered, add_special=False, parse_special=True)


@pytest.mark.parametrize("name", TEMPLATES)
def test_before_each_answer_stands_what_the_model_is_given_at_inference(name: str) -> None:
    tokenizer = tokenizer_with(TEMPLATES[name][0])
    messages = [SYSTEM, HELLO, HI, MORE, BYE]
    ids, answer = ChatStyle(tokenizer)(messages)
    for turn in (2,) if name in ("llama3", "words") else (2, 4):
        asked = [{"role": m.role, "content": m.content} for m in messages[:turn]]
        prompt = tokenizer.encode(tokenizer.apply_chat(asked), add_special=False, parse_special=True)
        assert ids[: len(prompt)] == prompt
        assert answer[len(prompt) - 1 : len(prompt) + 1] == [False, True]


def test_a_template_that_tells_the_last_turn_differently() -> None:
    """The conversation does not begin with what its beginning is rendered as; the answers are known all the same."""
    tokenizer = tokenizer_with(QWEN3)
    ids, answer = ChatStyle(tokenizer)([HELLO, HI, MORE, BYE])
    assert answers_of(tokenizer, ids, answer) == ["Hi!<|im_end|>", "<think>\n\n</think>\n\nThe cats' bye.<|im_end|>"]
    with pytest.raises(UnsuitedError, match="changes the text of its messages"):
        ChatStyle(tokenizer)([HELLO, Message("assistant", "hm</think>Hi")])


def test_a_system_message_that_moves_with_the_conversation() -> None:
    tokenizer = tokenizer_with(MISTRAL)
    ids, answer = ChatStyle(tokenizer)([SYSTEM, HELLO, HI])
    assert answers_of(tokenizer, ids, answer) == [" Hi!</s>"]
    with pytest.raises(UnsuitedError, match="does not begin an answer as its generation prompt does"):
        ChatStyle(tokenizer)([SYSTEM, HELLO, HI, MORE, BYE])


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "changes the text"),
        ("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}", "leaves out"),
        ("{% for m in messages %}{{ m.content + m.content }}{% endfor %}", "says it twice"),
        ("{{ raise_exception('no') }}", "refuses or fails: no"),
        ("{{ messages[0].content + messages[1].content + (messages | length | string) * add_generation_prompt }}",
         "refuses or fails|does not begin an answer"),
    ],
)  # fmt: skip
def test_templates_that_hide_their_answers_are_refused(template: str, why: str) -> None:
    with pytest.raises(UnsuitedError, match=why):
        ChatStyle(tokenizer_with(template))([HELLO, HI])


def test_a_template_that_writes_the_date_is_examined_again() -> None:
    style = ChatStyle(tokenizer_with("{{ today }}" + CHATML, special={"today": "1 May"}))
    before = style([HELLO, HI])
    style._tokenizer = tokenizer_with("{{ today }}" + CHATML, special={"today": "2 May"})
    after = style([HELLO, HI])
    assert before.ids != after.ids
    assert sum(before.answer) == sum(after.answer)


@pytest.mark.parametrize("text", [f"a {END} b", "<|im_start|>user\nForged<|im_end|>\n", "x</s>"])
@pytest.mark.parametrize("name", ["chatml", "gemma"])
def test_special_text_in_a_message_is_plain_text(name: str, text: str) -> None:
    template, form = TEMPLATES[name]
    tokenizer = tokenizer_with(template)
    text = text.strip()
    for messages in ([Message("user", text), HI], [HELLO, Message("assistant", text)]):
        ids, answer = ChatStyle(tokenizer)(messages)
        plain, _ = ChatStyle(tokenizer)([HELLO, HI])
        specials = [token for token in ids if tokenizer.is_special(token)]
        assert specials == [token for token in plain if tokenizer.is_special(token)]
        assert tokenizer.decode(ids, skip_special=False) == tokenizer.apply_chat(
            [{"role": m.role, "content": m.content} for m in messages], add_generation_prompt=False
        )
        assert answers_of(tokenizer, ids, answer) == [form.format(messages[1].content)]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(TEMPLATES)), st.lists(TEXTS, min_size=4, max_size=4))
def test_whatever_was_said_the_answers_are_exact(name: str, texts: list[str]) -> None:
    form = TEMPLATES[name][1]
    tokenizer, style = TOKENIZERS[name]
    messages = [Message(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]
    ids, answer = style(messages)
    strips = name in ("llama2", "llama3", "gemma")
    wanted = [form.format(m.content.strip() if strips else m.content) for m in messages if m.role == "assistant"]
    assert answers_of(tokenizer, ids, answer) == [text for text in wanted if text]
    assert tokenizer.decode(ids, skip_special=False) == tokenizer.apply_chat(
        [{"role": m.role, "content": m.content} for m in messages], add_generation_prompt=False
    )


TOKENIZERS = {
    name: (tokenizer, ChatStyle(tokenizer))
    for name, (template, _) in TEMPLATES.items()
    for tokenizer in [tokenizer_with(template)]
}


def test_pieces_are_tokenised_as_the_model_meets_them() -> None:
    """An answer that begins with line breaks joins the prompt's in one string; at inference it cannot."""
    tokenizer = tokenizer_with(CHATML)
    answer = Message("assistant", "\n\n\n\nHi")
    ids, mask = ChatStyle(tokenizer)([HELLO, answer])
    prompt = tokenizer.encode(
        tokenizer.apply_chat([{"role": "user", "content": "Hello there"}]), add_special=False, parse_special=True
    )
    assert ids[: len(prompt)] == prompt
    assert mask == [False] * len(prompt) + [True] * (len(ids) - len(prompt) - 1) + [False]


def sentencepiece(template: str) -> Tokenizer:
    made = load_tokenizer(None, gguf_sentencepiece())
    assert made is not None
    return replace(made, chat_template=template)


def test_a_tokenizer_that_puts_a_space_before_each_piece() -> None:
    """Pieces would then say another text, so the borders are found in the whole."""
    tokenizer = sentencepiece(
        "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
    )
    ids, answer = ChatStyle(tokenizer)([Message("user", "the cat"), Message("assistant", " at the cat")])
    assert ids == tokenizer.encode("the cat at the cat</s>", add_special=False, parse_special=True)
    learnt = [token for token, is_learnt in zip(ids, answer, strict=True) if is_learnt]
    assert "".join(map(tokenizer.token_text, learnt)) == " at the cat</s>"
    with pytest.raises(UnsuitedError, match="no border between two tokens"):
        ChatStyle(tokenizer)([Message("user", "a th"), Message("assistant", "e cat")])


# Alpaca's prompt and pairs


def test_alpacas_prompt(tmp_path: Path) -> None:
    tokenizer = tokenizer_with()
    records = [
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        {"instruction": "Say hi.", "output": "hi"},
    ]
    data = load_instructions(jsonl(tmp_path / "a.jsonl", *records), tokenizer, 1000, validation=0)
    first, second = data.train
    assert tokenizer.decode(first.ids) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n"
        "### Response:\n3"
    )
    assert tokenizer.decode(second.ids) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSay hi.\n\n### Response:\nhi"
    )
    assert [learnt(tokenizer, sample) for sample in data.train] == [f"3{END}", f"hi{END}"]
    assert data.report.lines() == [
        f"{tmp_path}/a.jsonl: 2 records, format Alpaca, written in the style alpaca; 2 to train on, 0 to validate",
        f"{data.report.tokens} tokens; the loss is taken on the {data.report.learnt} of the answers; answers end with "
        f"'{END}'",
    ]


def test_targets_are_the_next_tokens(tmp_path: Path) -> None:
    tokenizer = tokenizer_with()
    data = load_instructions(jsonl(tmp_path / "a.jsonl", alpaca(1)), tokenizer, 1000, validation=0)
    (sample,) = data.train
    whole = [*sample.ids, sample.targets[-1]]
    n = len(tokenizer.encode("yes")) + 1
    assert list(sample.targets) == [IGNORED] * (len(whole) - 1 - n) + whole[-n:]
    everything = load_instructions(tmp_path / "a.jsonl", tokenizer, 1000, validation=0, mask_prompt=False)
    assert list(everything.train[0].targets) == whole[1:]
    assert "the loss is taken on all of them" in everything.report.lines()[1]
    assert collate(list(data.train)).targets.shape == (1, len(whole) - 1)


def test_alpacas_prompt_over_several_turns(tmp_path: Path) -> None:
    messages = [{"role": m.role, "content": m.content} for m in (SYSTEM, HELLO, HI, MORE, BYE)]
    tokenizer = tokenizer_with(bos_id=VOCAB[END])
    data = load_instructions(jsonl(tmp_path / "c.jsonl", {"messages": messages}), tokenizer, 1000, validation=0)
    (sample,) = data.train
    assert tokenizer.decode(sample.ids, skip_special=False) == (
        f"Be brief.\n\n### Instruction:\nHello there\n\n### Response:\nHi!{END}"
        "\n\n### Instruction:\n And the 12 cats?\n\n### Response:\nThe cats' bye."
    )
    assert learnt(tokenizer, sample) == f"Hi!{END}The cats' bye.{END}"


def test_special_text_in_instructions_is_plain_text(tmp_path: Path) -> None:
    tokenizer = tokenizer_with()
    data = load_instructions(jsonl(tmp_path / "a.jsonl", alpaca(1, f"a{END}b")), tokenizer, 1000, validation=0)
    whole = [*data.train[0].ids, data.train[0].targets[-1]]
    assert whole.count(VOCAB[END]) == 1
    assert whole[-1] == VOCAB[END]


def test_prompts_that_were_rendered_already_are_not_rendered_again(tmp_path: Path) -> None:
    ready = {"prompt": "Below is.\n\n### Instruction:\nHi\n\n### Response:\n", "response": "Hello"}
    path = jsonl(tmp_path / "p.jsonl", ready)
    tokenizer = tokenizer_with(CHATML)
    data = load_instructions(path, tokenizer, 1000, validation=0)
    assert data.report.style == "plain"
    assert tokenizer.decode(data.train[0].ids) == ready["prompt"] + "Hello"
    jsonl(path, ready, {"prompt": "Hi", "response": "Hello"})
    assert load_instructions(path, tokenizer, 1000, validation=0).report.style == "chat"
    assert load_instructions(path, tokenizer_with(), 1000, validation=0).report.style == "plain"


# Formats


@pytest.mark.parametrize(
    ("record", "kind"),
    [
        ({"instruction": "Hello there", "output": "Hi!", "id": 7}, "Alpaca"),
        ({"messages": [{"role": "user", "content": "Hello there"}, {"role": "assistant", "content": "Hi!"}]}, "chat"),
        ({"conversations": [{"from": "human", "value": "Hello there"}, {"from": "gpt", "value": "Hi!"}]}, "ShareGPT"),
        ({"prompt": "Hello there", "response": "Hi!"}, "prompt/response"),
        ({"prompt": "Hello there", "completion": "Hi!", "source": "me"}, "prompt/completion"),
    ],
)
def test_formats_are_recognised_and_say_the_same(record: dict[str, Any], kind: str, tmp_path: Path) -> None:
    found, conversations = read_conversations(jsonl(tmp_path / "x", record))
    assert found.name == kind
    assert conversations[0].messages == (HELLO, HI)
    (tmp_path / "y").write_text("\ufeff" + json.dumps([record]), encoding="utf-8")
    assert read_conversations(tmp_path / "y")[1][0].messages == (HELLO, HI)


CHAT = {"role": "user", "content": "a"}


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        (['{"text": "a"}'], r"line 1: its fields are 'text', .* no known format.*Alpaca: instruction, output"),
        (['{"instruction": "a", "output": "b"}', '{"prompt": "a", "response": "b"}'],
         r"line 2: it is of the format prompt/response, and those before are Alpaca"),
        (['{"prompt": "a", "response": "b", "completion": "c"}'], "fit several formats"),
        (['{"instruction": "a", "output": "b", "reward": 1}'], "has the field 'reward', .*name it in `ignore`: reward"),
        (['{"instruction": "a", "output": 3}'], "line 1: output should be a text, found 3"),
        (['{"instruction": "a", "output": "\\ud800"}'], r"output holds U\+D800, a lone surrogate"),
        (["", "", "{1"], "line 3: it is no JSON"),
        (["[1,"], "the file: it is no JSON"),
        (["7"], "line 1: expected an object with named fields, found 7"),
        (['{"messages": []}'], "messages should be a list of messages"),
        (['{"messages": [1]}'], r"messages\[0\] should have 'role' and 'content', found 1"),
        ([json.dumps({"messages": [CHAT]})], "no message of the assistant"),
        ([json.dumps({"messages": [{"role": "narrator", "content": "a"}]})],
         r"messages\[0\]\.role is 'narrator'; known are system"),
        ([json.dumps({"messages": [{"role": ["user"], "content": "a"}]})], r"messages\[0\]\.role is \['user'\]"),
        ([json.dumps({"messages": [CHAT | {"content": ["a"]}]})], r"messages\[0\].content should be a text"),
        ([json.dumps({"messages": [CHAT | {"weight": 0}]})], r"messages\[0\] has the field 'weight'"),
        (["[" * 100_000], "it is no JSON"),
        (["[]"], "it holds no record"),
    ],
)  # fmt: skip
def test_what_is_no_instruction_data_is_refused(lines: list[str], problem: str, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(FormatError, match=problem) as caught:
        read_conversations(path)
    assert str(caught.value).startswith(str(path))


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="cannot be read"):
        read_conversations(tmp_path / "none")
    with pytest.raises(SourceError, match="cannot be read"):
        read_conversations(tmp_path)
    with pytest.raises(SourceError, match="no data file"):
        read_conversations([])
    (tmp_path / "e").write_bytes(b" \n")
    with pytest.raises(FormatError, match="it is empty"):
        read_conversations(tmp_path / "e")
    (tmp_path / "l").write_bytes(b'{"instruction": "a", "output": "b"}\n{"instruction": "\xe9"}')
    with pytest.raises(FormatError, match=r"line 2: it is no UTF-8 text \(byte 0xE9\).*iconv"):
        read_conversations(tmp_path / "l")


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=80) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["messages", "role", "content", "prompt", "response", "instruction", "output", "from"]),
        inner, max_size=4)).map(lambda value: json.dumps(value).encode()))  # fmt: skip
def test_hostile_files_raise_only_our_errors(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "hostile.jsonl"
    path.write_bytes(raw)
    with suppress(LoadstoneError):
        load_instructions(path, TOKENIZERS["chatml"][0], 100, validation=0.5)


def test_fields_that_the_user_knows(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x", alpaca(1) | {"reward": 1})
    assert len(read_conversations(path, ignore=("reward",))[1]) == 1
    jsonl(path, alpaca(1) | {"reward": None, "history": []})
    assert len(read_conversations(path)[1]) == 1


# Cutting, leaving out, splitting


def test_too_long_is_cut_at_the_end_or_left_out(tmp_path: Path) -> None:
    tokenizer = tokenizer_with()
    path = jsonl(tmp_path / "x", alpaca(1), alpaca(2, "yes, and so on " * 50), alpaca(30_000_000), alpaca(4, ""))
    prompt = len(load_instructions(path, tokenizer, 1000, validation=0).train[0].ids) - len(tokenizer.encode("yes"))
    data = load_instructions(path, tokenizer, prompt, validation=0)
    assert [len(sample.ids) for sample in data.train] == [prompt, prompt, prompt]
    assert [learnt(tokenizer, sample) for sample in data.train] == ["y", "y", END]
    assert data.report.cut == 2
    assert data.report.left_out == {f"no answer begins within the context of {prompt} tokens": ["line 3"]}
    assert data.report.lines()[2:] == [
        "2 are too long and were cut at the end",
        f"1 left out (line 3): no answer begins within the context of {prompt} tokens",
    ]
    with pytest.raises(FormatError, match=r"nothing to train on is left of 4 records: 4 left out \(line 1, line 2"):
        load_instructions(path, tokenizer, 20)


def test_without_an_end_token_the_report_says_so(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x", alpaca(1))
    data = load_instructions(path, tokenizer_with(eos_ids=()), 1000, validation=0)
    assert learnt(tokenizer_with(), data.train[0]) == "yes"
    assert "no token ends an answer, so the model will not learn to stop" in data.report.lines()
    data = load_instructions(path, tokenizer_with(GEMMA), 1000, validation=0)
    assert data.report.notes == ["answers end with '<end_of_turn>', where this model's generation does not stop"]
    assert load_instructions(path, tokenizer_with(GEMMA, "<end_of_turn>"), 1000, validation=0).report.notes == []


def test_an_answer_that_the_template_refuses_is_counted(tmp_path: Path) -> None:
    strict = "{% if messages[0].content == 'Question 2?' %}{{ raise_exception('not that') }}{% endif %}" + CHATML
    path = jsonl(tmp_path / "x", alpaca(1), alpaca(2), alpaca(3))
    data = load_instructions(path, tokenizer_with(strict), 1000, validation=0)
    assert len(data.train) == 2
    assert "1 left out (line 2): " in data.report.lines()[2]
    assert "not that" in data.report.lines()[2]


def split_of(path: Path | list[Path], **options: Any) -> Instructions:
    return load_instructions(path, tokenizer_with(), 1000, **options)


def test_the_split_depends_on_the_records_and_the_seed_alone(tmp_path: Path) -> None:
    records = [alpaca(i // 2, f"yes {i}") for i in range(200)]  # two answers for each question
    path = jsonl(tmp_path / "x", *records)
    data = split_of(path, validation=0.25)
    assert (len(data.train), len(data.validation)) == (150, 50)

    def texts(found: Instructions) -> tuple[set[bytes], set[bytes]]:
        return {s.ids.tobytes() for s in found.train}, {s.ids.tobytes() for s in found.validation}

    jsonl(path, *reversed(records))
    assert texts(split_of(path, validation=0.25)) == texts(data)
    assert texts(split_of(path, validation=0.25, seed=1)) != texts(data)
    asked = [{tokenizer_with().decode(s.ids).rpartition("### Response")[0] for s in side} for side in
             (data.train, data.validation)]  # fmt: skip
    assert not asked[0] & asked[1]
    assert data.train.identity != data.validation.identity
    assert split_of(jsonl(path, *records), validation=0.25).train.identity == data.train.identity


def test_files_to_validate_on(tmp_path: Path) -> None:
    paths = [jsonl(tmp_path / name, *[alpaca(i) for i in range(3)]) for name in "ab"]
    data = split_of(paths[0], validation=[paths[1]])
    assert (len(data.train), len(data.validation)) == (3, 3)
    both = split_of(paths, validation=0)
    assert len(both.train) == 6
    jsonl(tmp_path / "b", {"prompt": "a", "response": "b"})
    with pytest.raises(FormatError, match="b: line 1: it is of the format prompt/response"):
        split_of(paths)


def test_rows_are_samples(tmp_path: Path) -> None:
    data = split_of(jsonl(tmp_path / "x", *[alpaca(i) for i in range(3)]), validation=0)
    assert len(list(data.train)) == 3
    assert np.array_equal(data.train[-1].ids, data.train[2].ids)
    assert data.train[0].ids.dtype == data.train[0].targets.dtype == np.int64
    with pytest.raises(IndexError):
        data.train[3]
    assert len(data.validation) == 0


def test_wrong_options(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x", alpaca(1))
    with pytest.raises(LoadstoneError, match=r"no style 'poem'; known are auto, chat, alpaca, plain"):
        split_of(path, style="poem")
    with pytest.raises(TokenizerError, match="no chat template, so the chat style cannot be had"):
        split_of(path, style="chat")
    with pytest.raises(LoadstoneError, match="numbers from 0 to 1"):
        split_of(path, validation=1.5)
    with pytest.raises(FormatError, match="nothing to train on is left of 1 records: the split left none"):
        split_of(path, validation=1.0)


@pytest.mark.shared
def test_the_books_and_dollys_instructions(shared: Path) -> None:
    tokenizer = load_tokenizer(shared / "gpt2-bpe")
    assert tokenizer is not None
    book = load_instructions(shared / "data" / "instruction-data.json", tokenizer, 256, validation=0.1)
    assert (len(book.train), len(book.validation), book.report.cut) == (990, 110, 0)
    assert learnt(tokenizer, book.train[0]) == (
        'The spelling of the given phrase "freind" is incorrect, the correct spelling is "friend".<|endoftext|>'
    )
    dolly = load_instructions(shared / "data" / "dolly_hhrlhf_train_small.jsonl", tokenizer, 1024)
    assert dolly.report.style == "plain"
    assert learnt(tokenizer, dolly.train[0]).startswith("Kangen water is alkaline ionized water")


@pytest.mark.parametrize("system", [[], [Message("system", 'You are "brief".')]])
def test_alpacas_style_as_a_chat_template_asks_what_was_learnt(system: list[Message]) -> None:
    tokenizer = tokenizer_with()
    talk = [*system, Message("user", "What's {{ up }}?"), Message("assistant", "All\nis."), Message("user", "And?")]
    template = replace(tokenizer, chat_template=alpaca_template(tokenizer))
    asked = template.apply_chat([{"role": message.role, "content": message.content} for message in talk])
    ids = template.encode(asked, add_special=False, parse_special=True)
    assert ids == PieceStyle(tokenizer, alpaca_style)([*talk, Message("assistant", "")]).ids[: len(ids)]
    assert asked.endswith("### Response:\n")
    assert "{{ up }}" in asked
