"""What requests may say: OpenAI's fields, and Loadstone's own beside them. What is not known is refused, not ignored.

Source of the fields: OpenAI's API reference (completions, chat, embeddings). Fields that ask for what a GPT here does
not do (tools, images, logit_bias) are known, and any value but the harmless one is refused by name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from ..sampling import Sampling

TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(max_length=1_000_000)]
Text = Annotated[str, Field(max_length=10_000_000)]
Stop = Text | Annotated[list[Text], Field(max_length=16)] | None
MOST_TOP = 20  # alternatives beside each token, as OpenAI's chat has it


def _refuse(value: Any) -> Any:
    if value:
        raise ValueError("not supported here; leave it out")
    return value


Unsupported = Annotated[Any, AfterValidator(_refuse)]  # only a value that asks for nothing is taken


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _without_null(cls, given: Any) -> Any:
        """Null is as if left out, as with OpenAI; many clients send every field."""
        return {key: value for key, value in given.items() if value is not None} if isinstance(given, dict) else given


class StreamOptions(Strict):
    include_usage: bool = False


class Asked(Strict):
    """What completions and chat have in common."""

    model: str | None = Field(None, description="One of /v1/models; may be left out if only one is served.")
    n: int = Field(1, ge=1, le=16, description="Answers to the same prompt; each has a seed of its own.")
    temperature: float = Field(1.0, ge=0, le=100, description="0 takes the likeliest token.")
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int | None = Field(None, ge=1, description="Loadstone's own: the k likeliest tokens.")
    min_p: float = Field(0.0, ge=0, le=1, description="Loadstone's own: tokens at least so likely as the likeliest.")
    repetition_penalty: float = Field(1.0, gt=0, le=100, description="Loadstone's own.")
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: Stop = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    details: int | None = Field(
        None,
        ge=0,
        le=MOST_TOP,
        description="Loadstone's own: describe each token under `details` (id, bytes, log-probability), beside so many "
        "alternatives; and name the prompt's ids.",
    )
    # What the answer does not depend on:
    user: str | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    presence_penalty: Unsupported = None
    frequency_penalty: Unsupported = None
    logit_bias: Unsupported = None

    def sampling(self) -> Sampling:
        return Sampling(
            temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p or None,
            repetition_penalty=self.repetition_penalty,
        )  # fmt: skip

    def stops(self) -> list[str]:
        found = [self.stop] if isinstance(self.stop, str) else list(self.stop or ())
        return [text for text in found if text]


class CompletionRequest(Asked):
    prompt: (
        Text
        | TokenIds
        | Annotated[list[Text], Field(min_length=1, max_length=128)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=128)]
    )
    max_tokens: int | None = Field(16, ge=0)
    logprobs: int | None = Field(None, ge=0, le=MOST_TOP)
    echo: bool = Field(False, description="The prompt comes before the answer, with log-probabilities if asked for.")
    best_of: Literal[1] | None = None
    suffix: Unsupported = None


class Part(Strict):
    type: Literal["text"]
    text: Text


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[Part]
    name: str | None = None

    def as_turn(self) -> dict[str, str]:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ResponseFormat(Strict):
    type: Literal["text"] = "text"


class ChatRequest(Asked):
    messages: Annotated[list[Message], Field(min_length=1, max_length=10_000)]
    max_tokens: int | None = Field(None, ge=0)
    max_completion_tokens: int | None = Field(None, ge=0)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MOST_TOP, description="Beside each token; only with `logprobs`.")
    response_format: ResponseFormat | None = None
    store: bool = False
    tools: Unsupported = None
    functions: Unsupported = None
    tool_choice: Literal["none", "auto"] | None = None

    def most(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


class EmbeddingRequest(Strict):
    model: str | None = None
    input: (
        Text
        | TokenIds
        | Annotated[list[Text], Field(min_length=1, max_length=2048)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=2048)]
    )
    encoding_format: Literal["float", "base64"] = "float"
    pooling: Literal["mean", "last"] = Field("mean", description="Loadstone's own: of the last hidden states.")
    dimensions: Unsupported = None
    user: str | None = None


class TokenizeRequest(Strict):
    model: str | None = None
    text: Text
    add_special: bool = True
    parse_special: bool = False


class DetokenizeRequest(Strict):
    model: str | None = None
    tokens: TokenIds
    skip_special: bool = False
