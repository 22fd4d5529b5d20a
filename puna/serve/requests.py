"""What clients may send, field by field. Anything else is refused by name, never ignored."""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from puna.infer.constrain import Constraint
from puna.infer.sampling import SamplingParams
from puna.runtime.seeds import derive_seed

TokenIds = Annotated[list[int], Field(min_length=1)]
TokenName = Annotated[str, Field(pattern=r"^\d{1,9}$")]
StopString = Annotated[str, Field(min_length=1)]


IDLE: dict[str, tuple[object, ...]] = {
    "suffix": ("",),
    "best_of": (1,),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "modalities": (["text"],),
    "tools": ([],),
    "tool_choice": ("none",),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none",),
    "verbosity": ("medium",),
    "reasoning_effort": ("none",),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "moderation": (),
    "prompt_cache_retention": (),
    "prompt_cache_options": (),
}
"""Parameter of OpenAI's that is not supported -> the values, besides null, that ask for nothing and are accepted."""


class StreamOptions(BaseModel):
    """How a stream is to look."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class JsonSchema(BaseModel):
    """A schema that the answer has to follow."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str
    """A label, as is the description: the model sees neither."""
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None
    """Answers always follow the schema; false asks for less than that."""


class ResponseFormat(BaseModel):
    """What kind of text an answer is."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_where_named(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError('json_schema goes with type = "json_schema", and only with that')
        return self


class StructuredOutputs(BaseModel):
    """What an answer has to look like: one of these. An addition to OpenAI's protocol."""

    model_config = ConfigDict(extra="forbid", strict=True)

    json_: dict[str, Any] | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[Annotated[str, Field(min_length=1)]] | None = Field(None, min_length=1)
    grammar: str | None = None


class GenerationRequest(BaseModel):
    """What both endpoints take.

    top_k, min_p, repetition_penalty, stop_token_ids, structured_outputs and ignore_eos are additions to OpenAI's
    protocol, under the names that other servers gave them.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0)
    logit_bias: dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], Annotated[float, Field(ge=-100, le=100)]] | None = (
        None
    )
    max_tokens: int | None = Field(None, ge=1)
    n: int | None = Field(None, ge=1, le=128)
    seed: int | None = None
    stop: StopString | list[StopString] | None = None
    stop_token_ids: list[int] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    ignore_eos: bool = False
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    """A label for the client's own records."""

    @model_validator(mode="before")
    @classmethod
    def _drop_idle(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        return {k: v for k, v in body.items() if k not in IDLE or (v is not None and v not in IDLE[k])}

    @field_validator("stream_options")
    @classmethod
    def _options_need_stream(cls, options: StreamOptions | None, info: ValidationInfo) -> StreamOptions | None:
        if options is not None and not info.data.get("stream"):
            raise ValueError("is only allowed together with stream = true")
        return options

    @field_validator("structured_outputs")
    @classmethod
    def _one_constraint(cls, outputs: StructuredOutputs | None, info: ValidationInfo) -> StructuredOutputs | None:
        if outputs is not None:
            given = outputs.model_dump(exclude_none=True)
            form = info.data.get("response_format")
            if len(given) != 1 or (form is not None and form.type != "text"):
                raise ValueError("takes one of json, regex, choice and grammar, and no response_format beside it")
        return outputs

    @property
    def constrained_by(self) -> str:
        """The parameter that says what the answer has to look like."""
        return "response_format" if self.structured_outputs is None else "structured_outputs"

    def _constraint(self) -> Constraint | None:
        outputs, form = self.structured_outputs, self.response_format
        if outputs is not None:
            schema = None if outputs.json_ is None else json.dumps(outputs.json_)
            return Constraint(schema, outputs.regex, tuple(outputs.choice or ()), outputs.grammar)
        if form is None or form.type == "text":
            return None
        return Constraint(json.dumps({"type": "object"} if form.json_schema is None else form.json_schema.schema_))

    def sampling(
        self, choice: int, *, max_tokens: int | None, logprobs: int | None, prompt_logprobs: int | None = None
    ) -> SamplingParams:
        """Parameters of the `choice`-th answer to one prompt: with a seed, each has a random stream of its own."""
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=self.top_k or 0,
            top_p=1.0 if self.top_p is None else self.top_p,
            min_p=self.min_p or 0.0,
            repetition_penalty=self.repetition_penalty or 1.0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=tuple((int(token_id), bias) for token_id, bias in (self.logit_bias or {}).items()),
            constraint=self._constraint(),
            seed=derive_seed(self.seed, choice) if choice and self.seed is not None else self.seed,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            stop_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=self.ignore_eos,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )


class CompletionRequest(GenerationRequest):
    """Body of POST /v1/completions."""

    prompt: str | TokenIds | Annotated[list[str], Field(min_length=1)] | Annotated[list[TokenIds], Field(min_length=1)]
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: bool | None = None

    max_tokens: int | None = Field(None, ge=0)
    """0 answers nothing: with `echo` and `logprobs` it measures the prompt."""

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """Each prompt, as text or ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if isinstance(self.prompt[0], int) else self.prompt

    def params(self, choice: int) -> SamplingParams:
        """See `sampling`."""
        return self.sampling(
            choice,
            max_tokens=16 if self.max_tokens is None else self.max_tokens,
            logprobs=self.logprobs,
            prompt_logprobs=self.logprobs if self.echo else None,
        )


class TextPart(BaseModel):
    """One piece of a message's content."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One turn of a conversation. The fields typed None come back from clients that send an answer as they got it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["developer", "system", "user", "assistant"]
    content: str | list[TextPart]
    name: None = None
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None

    def plain(self) -> dict[str, Any]:
        """Role and content, as `render_chat` takes them; "developer" is the protocol's newer word for "system"."""
        content = self.content
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(GenerationRequest):
    """Body of POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    metadata: dict[str, str] | None = None
    """Labels for the client's own records, as are the next two."""
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @field_validator("max_completion_tokens")
    @classmethod
    def _one_limit(cls, limit: int | None, info: ValidationInfo) -> int | None:
        if limit is not None and info.data.get("max_tokens") not in (None, limit):
            raise ValueError("differs from max_tokens, its older name; send one of them")
        return limit

    @field_validator("top_logprobs")
    @classmethod
    def _top_needs_logprobs(cls, top: int | None, info: ValidationInfo) -> int | None:
        if top is not None and not info.data.get("logprobs"):
            raise ValueError("needs logprobs = true")
        return top

    def params(self, choice: int) -> SamplingParams:
        """See `sampling`."""
        limit = self.max_completion_tokens or self.max_tokens
        return self.sampling(choice, max_tokens=limit, logprobs=(self.top_logprobs or 0) if self.logprobs else None)
