"""schemathesis against our own OpenAPI schema, and worse bodies than it makes: always an answer, never a failure.

A longer run by hand: SCHEMATHESIS_EXAMPLES=2000 pytest tests/serve/test_schema.py
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from schemathesis import Case
from schemathesis.checks import not_a_server_error

from loadstone.serve.app import create_app
from serving import Serving, serving, small

EXAMPLES = int(os.environ.get("SCHEMATHESIS_EXAMPLES", "6"))  # of each of the operations
SCHEMA = schemathesis.openapi.from_dict(create_app([small()]).openapi())
POSTS = (
    "/v1/completions /v1/chat/completions /v1/embeddings /tokenize /detokenize /inspect/surprisal /inspect/attention"
).split()


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with serving(small("small", chat=True, context=64)) as found:
        yield found


@SCHEMA.parametrize()
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_request_of_the_schema_fails(case: Case[Any], server: Serving) -> None:
    case.call_and_validate(base_url=server.url, checks=[not_a_server_error])


TEXTS = st.text(st.characters(exclude_categories=())) | st.sampled_from(
    ["", "\ud800", "../x", "/etc/passwd", "http://127.0.0.1:1/", "small", "base64", "user", "<|endoftext|>", "\x00"]
)
NUMBERS = (
    st.integers()
    | st.floats()
    | st.sampled_from([10**400, -(2**63), 2**63, 1e308, 0, -1, 401, 400, True, float("nan")])
)
VALUES: SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(TEXTS | st.sampled_from(["role", "content"]), inner, max_size=3)
    ),
    max_leaves=8,
)
RIGHT: dict[str, Any] = {
    "model": "small", "prompt": "The cat", "messages": [{"role": "user", "content": "The cat"}], "input": "The cat",
    "text": "The cat", "tokens": [1, 2], "max_tokens": 2, "layer": 0, "head": 0,
}  # fmt: skip
FIELDS = (
    "n temperature top_p top_k min_p repetition_penalty seed stop stream stream_options details user logprobs echo "
    "top_logprobs encoding_format pooling top add_special logit_bias suffix tools response_format metadata"
).split()
WANTED = {
    "/v1/completions": "prompt max_tokens", "/v1/chat/completions": "messages max_tokens", "/v1/embeddings": "input",
    "/tokenize": "text", "/detokenize": "tokens", "/inspect/surprisal": "text", "/inspect/attention": "text layer head",
}  # fmt: skip


def check(server: Serving, path: str, body: bytes, **headers: str) -> int:
    found = server.call(path, body, **headers)
    assert 200 <= found.status < 500, (found.status, found.body)
    if found.status >= 400:
        error = found.json["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]
    return found.status


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_fields_of_any_kind_are_answered(server: Serving, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(POSTS))
    asked = {field: RIGHT[field] for field in ["model", *WANTED[path].split()]}
    names = st.sampled_from([*asked, *FIELDS]) | TEXTS
    asked |= data.draw(st.dictionaries(names, VALUES, max_size=2))
    check(server, path, json.dumps(asked).encode())


@pytest.mark.parametrize("path", POSTS)
def test_bodies_that_are_no_requests_are_refused(server: Serving, path: str) -> None:
    asked = json.dumps({field: RIGHT[field] for field in ["model", *WANTED[path].split()]}).encode()
    assert check(server, path, asked) == 200
    for body in (
        b"", b"{", b"null", b"[]", b"5", b'"text"', b"NaN", b"\xff\xfe\x00", b"\x00" * 99, asked[:-1], asked + b"x",
        asked.replace(b"small", b"\xc3\x28"), b"[" * 50_000, b'{"a":' * 50_000, gzip.compress(asked), b"\x80" + asked,
        asked[:-1] + b', "nothing": ' + b"9" * 5000 + b"}", b"prompt=The+cat",
    ):  # fmt: skip
        assert check(server, path, body) == 400, body[:40]
    assert check(server, path, gzip.compress(asked), content_encoding="gzip") == 400
    assert check(server, path, asked, content_type="text/plain") == 400
    twice = asked[:-1] + b', "model": "other"}'  # the last of two counts, as everywhere in Python
    assert check(server, path, twice) == 404


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("value", ["1e400", "-1e400", "NaN", "Infinity", "-0.0", "1E-400", "9" * 400, "5e-324", "true"])
def test_numbers_at_the_edges(server: Serving, path: str, value: str) -> None:
    asked = json.dumps({field: RIGHT[field] for field in ["model", *WANTED[path].split()]})
    for field in ("temperature", "top_p", "max_tokens", "seed", "n", "top_k", "repetition_penalty", "details"):
        check(server, path, f'{asked[:-1]}, "{field}": {value}}}'.encode())
