"""Chat templates: what HuggingFace's expect of their environment, and what hostile ones must not get."""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadstone.errors import TokenizerError
from loadstone.tokenizer import Tokenizer, chat, load_tokenizer
from small_vocabularies import byte_level, gguf_byte_level, write_pair

VOCAB, MERGES = byte_level()
END = "<|endoftext|>"
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Written over many lines, as Zephyr's is: trim_blocks and lstrip_blocks decide what the white space becomes.
LINES = """{% for message in messages %}
    {% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
    {% elif message.role == 'assistant' %}
{{ '<|assistant|>\n' + message.content + eos_token }}
    {%- endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
ALTERNATE = (
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}[{{ message['content'] }}]{% endfor %}"
)
HELLO = [{"role": "user", "content": "hello"}]
TALK = [*HELLO, {"role": "assistant", "content": "hi"}, {"role": "user", "content": "bye"}]


def with_template(template: str, **fields: Any) -> Tokenizer:
    tokenizer = load_tokenizer(None, gguf_byte_level(VOCAB, MERGES))
    assert tokenizer is not None
    return replace(tokenizer, chat_template=template, **fields)


def rendered(template: str, messages: Any = HELLO, **options: bool) -> str:
    return with_template(template).apply_chat(messages, **options)


def test_chatml() -> None:
    start = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n"
    assert rendered(CHATML) == start + "<|im_start|>assistant\n"
    assert rendered(CHATML, add_generation_prompt=False) == start
    system = [{"role": "system", "content": "S"}, *HELLO]
    assert rendered(CHATML, system, add_generation_prompt=False) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n"
    )


def test_white_space_around_blocks_is_transformers() -> None:
    assert rendered(LINES, TALK) == (f"<|user|>\nhello{END}\n<|assistant|>\nhi{END}<|user|>\nbye{END}\n<|assistant|>\n")


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ pad_token is defined }}", f"{END}|{END}||False"),
        ("{{ {'a': '<é>', 'b': [1, none, true]} | tojson }}", '{"a": "<é>", "b": [1, null, true]}'),
        ("{{ {'b': 1, 'a': 2} | tojson(indent=1, sort_keys=true) }}", '{\n "a": 2,\n "b": 1\n}'),
        ("{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}{% endfor %}", "02345678"),
        ("{% for i in range(9) %}{% if i > 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "012"),
        ("{% generation %}a{{ messages[0].content }}{% endgeneration %}b", "ahellob"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "1"),
        ("{{ messages[0]['content'].upper().split('L')|join('-') }}{{ ' x ' | trim }}{{ 'ab'[::-1] }}", "HE--Oxba"),
        ("{{ '=' * 3 ~ (1 + 2) ~ none }}{{ missing }}{{ messages[0].tool_calls is defined }}", "===3NoneFalse"),
        ("{{ messages[0]['name'] }}", "Ann"),
        ("{% macro show(x) %}<{{ x }}>{% endmacro %}{{ show('a') }}{{ messages | length }}", "<a>1"),
    ],
)  # fmt: skip
def test_what_templates_use(template: str, text: str) -> None:
    assert rendered(template, [{"role": "user", "content": "hello", "name": "Ann"}]) == text


def test_a_template_can_ask_for_the_date() -> None:
    before = datetime.now().astimezone().strftime("%d %b %Y")
    assert rendered("{{ strftime_now('%d %b %Y') }}") in (before, datetime.now().astimezone().strftime("%d %b %Y"))


def test_the_rendering_is_encoded_with_its_special_tokens() -> None:
    tokenizer = with_template("{{ eos_token }}{{ messages[0].content }}")
    ids = tokenizer.encode(tokenizer.apply_chat(HELLO), add_special=False, parse_special=True)
    assert ids == [VOCAB[END], *tokenizer.encode("hello")]


def test_a_template_refuses_in_its_own_words() -> None:
    assert rendered(ALTERNATE, TALK) == "[hello][hi][bye]"
    with pytest.raises(
        TokenizerError, match=r"^the GGUF file: its chat template refuses or fails: roles must alternate$"
    ):
        rendered(ALTERNATE, [*HELLO, *HELLO])


@pytest.mark.parametrize(
    "messages",
    [[{"role": "user"}], [{"content": "x"}], [{"role": "user", "content": ["x"]}], [{"role": 1, "content": ""}]],
)
def test_messages_need_role_and_content(messages: Any) -> None:
    with pytest.raises(TokenizerError, match="Chat message 0 needs a `role` and a `content`, both text"):
        rendered(CHATML, messages)


def test_no_template_is_said_so() -> None:
    tokenizer = load_tokenizer(None, gguf_byte_level(VOCAB, MERGES))
    assert tokenizer is not None
    with pytest.raises(TokenizerError, match="there is no chat template, so this is no chat model"):
        tokenizer.apply_chat(HELLO)


def test_messages_may_be_any_mapping() -> None:
    assert (
        rendered("{{ messages[0] | tojson }}", [MappingProxyType(HELLO[0])]) == '{"role": "user", "content": "hello"}'
    )


@given(st.lists(st.tuples(st.sampled_from(("system", "user", "assistant")), st.text(max_size=20)), max_size=5))
@settings(max_examples=60, deadline=None)
def test_content_is_data_and_never_template(turns: list[tuple[str, str]]) -> None:
    messages = [{"role": role, "content": content + "{{ 1 + 1 }}{% raw %}"} for role, content in turns]
    expected = "".join(f"<{m['role']}>{m['content']}" for m in messages)
    assert rendered("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}", messages) == expected


# --- where templates come from ----------------------------------------------------------------------------------------


def template_of(folder: Path, config: object = None, jinja: str | None = None) -> str | None:
    write_pair(folder, VOCAB, MERGES)
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": config}))
    if jinja is not None:
        (folder / "chat_template.jinja").write_text(jinja)
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None
    return tokenizer.chat_template


def test_a_template_comes_from_the_config_or_its_own_file(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    assert template_of(tmp_path) is None
    assert template_of(tmp_path, "A") == "A"
    assert template_of(tmp_path, named) == "D"
    assert template_of(tmp_path, "A", jinja="B") == "B"


def test_without_a_default_template_none_is_chosen(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"chat_template holds neither a text nor a list with .* `default`"):
        template_of(tmp_path, [{"name": "tool_use", "template": "T"}])


def test_a_gguf_file_carries_its_template() -> None:
    metadata = gguf_byte_level(VOCAB, MERGES) | {"tokenizer.chat_template": "{{ messages[0].content }}{{ bos_token }}"}
    tokenizer = load_tokenizer(None, metadata)
    assert tokenizer is not None
    assert tokenizer.apply_chat(HELLO) == "hello" + END


# --- hostile templates ------------------------------------------------------------------------------------------------

ESCAPES = [
    "{{ ''.__class__.__mro__ }}",
    "{{ ''.__class__ }}",
    "{{ ''['__class__'] }}",
    "{{ '' | attr('__class__') }}",
    "{{ messages.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os }}",
    "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__code__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "{{ ['__class__'] | map('attr') | list }}{{ messages | map(attribute='__class__') | list }}",
    "{{ self._TemplateReference__context }}",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_the_sandbox_holds(template: str) -> None:
    messages = [dict(HELLO[0])]
    try:
        text = rendered(template, messages)
    except TokenizerError as error:
        text = str(error)
        assert "its chat template refuses or fails" in text
    assert not any(word in text for word in ("<class", "<function", "uid=", "<module", "<code"))
    assert messages == HELLO


@pytest.mark.parametrize("template", ["{{ messages.append(1) }}", "{{ messages[0].update({'role': 'x'}) }}"])
def test_a_template_changes_nothing(template: str) -> None:
    with pytest.raises(TokenizerError, match=r"access to attribute '(append|update)' of '\w+' object is unsafe"):
        rendered(template)


TOO_MUCH = {
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}": "does not end",
    "{% for a in range(99999) %}{% for b in range(99999) %}{{ a }}{% endfor %}{% endfor %}": "does not end",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}": "does not end",
    "{{ lipsum(n=9999999) }}": "does not end",
    "{{ range(10 ** 12) | sum }}": r"the result of \*\* would be too large",
    "{{ range(9999999) | sum }}": "Range too big",
    "{{ 'a'.center(9999999999) }}": "a number or text in it is too large",
    "{{ 'a' | center(9999999999) }}": "a number or text in it is too large",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "RecursionError|does not end",
    "{{ 'a' * 9999999 * 9 }}": r"the result of \* would be too large",
    "{{ 9999999 * [1, 2] }}": r"the result of \* would be too large",
    "{{ 9 ** 9 ** 9 }}": r"the result of \*\* would be too large",
    "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}": "too large",
    "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}": "too large",
    "{% set x = 'a' * 999999 %}{% for i in range(99) %}{{ x }}{% endfor %}": "the text would be too large",
}


@pytest.mark.parametrize("template", TOO_MUCH)
def test_a_template_ends_and_stays_small(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "STEPS", 200_000)
    started = time.monotonic()
    with pytest.raises(TokenizerError, match=f"its chat template refuses or fails: .*({TOO_MUCH[template]})"):
        rendered(template)
    assert time.monotonic() - started < 5


def test_the_bound_leaves_room_for_a_long_conversation() -> None:
    messages = [{"role": "user", "content": "hello"}] * 5_000
    assert rendered(CHATML, messages).count("hello") == 5_000


def test_the_bound_holds_in_any_thread_and_leaves_other_tracers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "STEPS", 50_000)
    endless, before = next(iter(TOO_MUCH)), sys.gettrace()

    def attempt(template: str) -> str:
        try:
            return rendered(template)
        except TokenizerError as error:
            return str(error)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(attempt, [endless, CHATML] * 4))
    assert all("does not end" in text for text in found[::2])
    assert all(text.endswith("assistant\n") for text in found[1::2])
    assert sys.gettrace() is before


@pytest.mark.parametrize(
    "template",
    [
        "{% for %}", "{{", "{% include 'x' %}", "{% import 'os' as os %}", "{{ 1 / 0 }}", "{{ 'a' + 1 }}",
        "{{ messages[9].role }}", "{{ nothing.role }}", "{{ nothing() }}", "{% generation %}", "{{ " + "(" * 5_000,
        "{{ 'x'.encode().nope() }}", "{% for a in 1 %}{% endfor %}", "{{ 'a' | int + 'b' }}",
        "{{ '%d' | format('x') }}",
        "{{ {}['a']['b'] }}", "{% if x %}" * 200 + "{% endif %}" * 200, "{% for x in [1] %}" * 30 + "{% endfor %}" * 30,
        "{{ strftime_now(5) }}", "{{ messages | fromjson }}", "{{ messages | map('nope') }}", "{{ [].pop() }}",
        "{{ {1: namespace} | tojson }}", "{{ 'a'.center(2) * 'b' }}", "{{ range(-1)[5] }}",
    ],
)  # fmt: skip
def test_broken_templates_are_refused_or_rendered(template: str) -> None:
    try:
        rendered(template)
    except TokenizerError as error:
        refusal = str(error)
    else:
        refusal = "the GGUF file: its chat template refuses or fails: "
    assert refusal.startswith("the GGUF file: its chat template refuses or fails: ")


PARTS = st.sampled_from(
    ["{{", "}}", "{%", "%}", " for x in messages ", " endfor ", " if ", " endif ", " set x = ", "x", "messages", "|",
     "tojson", "[0]", ".role", "'a'", "*", "~", "+", "(", ")", "9", " macro f() ", " endmacro ", "f()", "\n", "-", "#}",
     "{#", "range", "[", "]"]
)  # fmt: skip


@given(st.lists(PARTS, max_size=25).map("".join))
@settings(max_examples=300, deadline=None)
def test_wild_templates_give_text_or_a_refusal(template: str) -> None:
    try:
        text = rendered(template)
    except TokenizerError as error:
        text = str(error)
    assert isinstance(text, str)
