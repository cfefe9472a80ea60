"""Chat templates: Jinja programs that come with a model, written by strangers, and run in a sandbox.

The environment is what HuggingFace's templates expect (transformers, `apply_chat_template`). A template reaches nothing
of Python's, runs a bounded number of steps, and cannot build a huge text by repeating or doubling a small one.
"""

from __future__ import annotations

import json
import operator
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import lru_cache
from itertools import count
from types import FrameType
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..errors import TokenizerError

STEPS = 5_000_000  # Python lines that one rendering may run: some seconds; a long conversation needs thousands
SIZE = 10_000_000  # characters that a rendering, a sum or a product may have

_SIZE_AFTER: Mapping[str, Callable[[float, float], float]] = {"+": operator.add, "*": operator.mul}


def render(
    template: str, messages: Sequence[Mapping[str, str]], special: Mapping[str, str], where: str, add_prompt: bool
) -> str:
    """Run a chat template.

    Args:
        template: Jinja source.
        messages: `role` and `content` of each; other keys are passed on.
        special: `bos_token`, `eos_token`, ... as the template names them.
        where: where the template came from, for error texts.
        add_prompt: the template's `add_generation_prompt`.

    Raises:
        TokenizerError: the template is broken, tries what the sandbox forbids, does not end, or refuses the messages.
    """
    for i, message in enumerate(messages):
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise TokenizerError(
                f"Chat message {i} needs a `role` and a `content`, both text; it has {dict(message)!r}."
            )
    values = {**special, "messages": [dict(message) for message in messages], "add_generation_prompt": add_prompt}
    try:
        pieces = _compile(template).generate(values)
        with _bounded_steps():
            return _bounded_text(pieces)
    except Exception as error:  # a template can raise whatever Python can
        kind = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
        raise TokenizerError(f"{where}: its chat template refuses or fails: {kind}{error}") from None


class _Sandbox(ImmutableSandboxedEnvironment):
    """Refuses numbers, and sums, products and concatenations (`~`), that are larger than any conversation."""

    intercepted_binops = frozenset({"+", "*", "**"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        size_after = _SIZE_AFTER.get(operator)  # none for **, which no template needs
        if size_after is None or size_after(_size(left), _size(right)) > SIZE:
            raise SecurityError(f"the result of {operator} would be too large")
        return super().call_binop(context, operator, left, right)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for constant in tree.find_all(nodes.Const):
            _bounded(constant.value)  # a width, say: "x".center(10000000000)
        for concatenation in tree.find_all(nodes.Concat):
            concatenation.nodes = [
                nodes.Filter(node, "bounded", [], [], None, None, lineno=node.lineno) for node in concatenation.nodes
            ]
        return tree


class _Generation(Extension):
    """`{% generation %}` marks what the assistant wrote, for training; for rendering it changes nothing."""

    tags = {"generation"}  # noqa: RUF012 (jinja wants a set)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _size(value: Any) -> float:
    if hasattr(value, "__len__"):
        return len(value)
    return abs(value) if isinstance(value, int | float) else 0


def _bounded(value: Any) -> Any:
    if _size(value) > SIZE:
        raise SecurityError("a number or text in it is too large")
    return value


def _bounded_text(pieces: Iterator[str]) -> str:
    text, size = [], 0
    for piece in pieces:
        text.append(piece)
        size += len(piece)
        if size > SIZE:
            raise SecurityError("the text would be too large")
    return "".join(text)


@contextmanager
def _bounded_steps() -> Iterator[None]:
    """Python's trace hook sees each line that this thread runs: the one place where no kind of loop escapes."""
    steps = count()

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if next(steps) > STEPS:
            raise SecurityError(f"it does not end (more than {STEPS} steps)")
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


@lru_cache(maxsize=8)
def _compile(template: str) -> Template:
    sandbox = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation])
    sandbox.filters |= {"tojson": _tojson, "bounded": _bounded}
    sandbox.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return sandbox.from_string(template)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().astimezone().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML, which no model was trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
