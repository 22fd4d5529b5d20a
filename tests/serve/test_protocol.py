"""Refusals and shapes: what OpenAI's published description says, and what a recorded Llama server sent."""

import gzip
import json
import tarfile
from pathlib import Path
from typing import Any

import httpx
import pytest

CHAT = "chat/completions"
MESSAGES = [{"role": "user", "content": "Hi!"}]
SCHEMA = {"name": "thing", "schema": {"type": "object"}}
FORMAT = {"response_format": {"type": "json_schema", "json_schema": SCHEMA}}


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"service_tier": "flex"}, "service_tier", "not supported; leave it out or send 'auto' or send 'default'"),
        ({"frequency_penalty": 3}, "frequency_penalty", "less than or equal to 2"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "match pattern"),
        ({"logit_bias": {"260": 1}}, "logit_bias", "260 is not a token"),
        ({"tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"response_format": {"type": "yaml"}}, "response_format", "'text', 'json_object' or 'json_schema'"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema goes with type"),
        ({"response_format": {"type": "text", "json_schema": SCHEMA}}, "response_format", "json_schema goes with"),
        (FORMAT | {"structured_outputs": {"regex": "a"}}, "structured_outputs", "no response_format beside it"),
        ({"structured_outputs": {}}, "structured_outputs", "takes one of json, regex, choice and grammar"),
        ({"structured_outputs": {"choice": ["a", ""]}}, "structured_outputs", "at least 1 character"),
        ({"structured_outputs": {"regex": "(a"}}, "structured_outputs", "unclosed group"),
        ({"structured_outputs": {"grammar": "start: x"}}, "structured_outputs", "refused"),
        ({"structured_outputs": {"json": {"type": "wizard"}}}, "structured_outputs", "Invalid type: wizard"),
        ({"temprature": 1}, "temprature", "Did you mean temperature?"),
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"temperature": "hot"}, "temperature", "valid number"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"n": 1000}, "n", "128"),
        ({"stop": ""}, "stop", "at least 1 character"),
        ({"top_logprobs": 3}, "top_logprobs", "needs logprobs = true"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "together with stream = true"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens", "differs from max_tokens"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages", r"[0].role"),
        ({"messages": [{"role": "user"}]}, "messages", "[0].content"),
        ({"messages": [{"role": "user", "content": "x" * 5000}]}, "messages", "but the context holds 4096"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "[0].content"),
        ({"messages": [{"role": "user", "content": "\ufdd0"}]}, "messages", "noncharacter"),
    ],
)
def test_refused_chat(post, body: dict[str, Any], param: str, message: str) -> None:
    check_refusal(post(CHAT, **{"messages": MESSAGES, **body}), 400, param, message)


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({}, "prompt", "required"),
        ({"prompt": 3}, "prompt", "valid string; or Input should be a valid list"),
        ({"prompt": []}, "prompt", "at least 1 item"),
        ({"prompt": [300]}, "prompt", "300 is not a token"),
        ({"prompt": "x", "stop_token_ids": [99_999]}, "stop_token_ids", "99999 is not a token"),
        ({"prompt": "x", "suffix": "y"}, "suffix", "not supported"),
        ({"prompt": "x", "best_of": 4}, "best_of", "not supported; leave it out or send 1"),
        ({"prompt": "x", "messages": MESSAGES}, "messages", "no parameter messages"),
    ],
)
def test_refused_completion(post, body: dict[str, Any], param: str, message: str) -> None:
    check_refusal(post("completions", **body), 400, param, message)


def check_refusal(response: httpx.Response, status: int, param: str | None, message: str) -> None:
    assert response.status_code == status
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert message in error["message"]


def test_other_refusals(post, served) -> None:
    check_refusal(post(CHAT, messages=MESSAGES, model="gpt-4o"), 404, "model", "'gpt-4o' does not exist")
    check_refusal(httpx.get(f"{served.url}/v1/nothing"), 404, None, "GET /v1/nothing: Not Found")
    check_refusal(httpx.get(f"{served.url}/v1/completions"), 405, None, "Method Not Allowed")
    json_type = {"Content-Type": "application/json"}
    broken = httpx.post(f"{served.url}/v1/completions", content='{"prompt": ', headers=json_type)
    check_refusal(broken, 400, None, "not valid JSON")
    check_refusal(httpx.post(f"{served.url}/v1/completions", json=[1]), 400, None, "body is refused")
    assert post(CHAT, messages=[{"role": "user", "content": "x" * 5000}]).json()["error"]["code"] == (
        "context_length_exceeded"
    )


def test_parameters_that_ask_for_nothing_are_accepted(post) -> None:
    both = {
        "max_tokens": 2,
        "n": 1,
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "logit_bias": {},
        "user": "me",
        "seed": None,
    }
    both |= {"stop": None, "temperature": None, "top_p": None, "stream": False, "stream_options": None}
    chat = {
        "store": False,
        "metadata": {"a": "b"},
        "tools": None,
        "tool_choice": "none",
        "response_format": {"type": "text"},
    }
    chat |= {"parallel_tool_calls": True, "service_tier": "auto", "modalities": ["text"], "reasoning_effort": None}
    assert post(CHAT, messages=MESSAGES, **both, **chat).status_code == 200
    assert post("completions", prompt="x", suffix=None, best_of=1, echo=False, **both).status_code == 200


def test_answers_can_be_sent_back(post) -> None:
    """A conversation may hold the answer just as it came, the newer role's name, and text in parts."""
    answer = post(CHAT, messages=MESSAGES, max_tokens=3).json()["choices"][0]["message"]
    parts = [{"type": "text", "text": "And "}, {"type": "text", "text": "now?"}]
    messages = [{"role": "developer", "content": "Be kind."}, *MESSAGES, answer, {"role": "user", "content": parts}]
    assert post(CHAT, messages=messages, max_tokens=3).status_code == 200


def test_health(served) -> None:
    assert httpx.get(f"{served.url}/health").json() == {"status": "ok"}


@pytest.fixture(scope="module")
def published(request: pytest.FixtureRequest) -> dict[str, Any]:
    """OpenAI's description, with what OpenAPI 3.0 adds to JSON schema put in JSON schema's words."""
    yaml = pytest.importorskip("yaml")
    path = Path(__file__).resolve().parents[3] / "shared" / "data" / "serving" / "openai_openapi.yaml.gz"
    if not path.exists():
        pytest.skip("no folder of real data beside the checkout")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    description = yaml.load(gzip.decompress(path.read_bytes()), Loader=loader)

    def translate(node: Any) -> Any:
        if isinstance(node, list):
            return [translate(item) for item in node]
        if not isinstance(node, dict):
            return node
        plain = {key: translate(value) for key, value in node.items()}
        return {"anyOf": [plain, {"type": "null"}]} if plain.get("nullable") is True else plain

    return {"components": translate(description["components"])}


def check_published(published: dict[str, Any], name: str, body: Any) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.validate(body, {"$ref": f"#/components/schemas/{name}", **published})


def events(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.headers["content-type"].startswith("text/event-stream")
    *lines, last, end = response.text.split("\n\n")
    assert (last, end) == ("data: [DONE]", "")
    return [json.loads(line.removeprefix("data: ")) for line in lines]


@pytest.mark.parametrize("options", [{}, {"logprobs": True, "top_logprobs": 2, "n": 2}])
def test_chat_has_the_published_shape(post, published, options: dict[str, Any]) -> None:
    request = {"messages": MESSAGES, "max_tokens": 4, **options}
    check_published(published, "CreateChatCompletionResponse", post(CHAT, **request).json())
    for usage in (False, True):
        chunks = events(post(CHAT, **request, stream=True, stream_options={"include_usage": usage}))
        assert (chunks[-1].get("usage") is not None) is usage
        for chunk in chunks:
            check_published(published, "CreateChatCompletionStreamResponse", chunk)


@pytest.mark.parametrize("options", [{}, {"logprobs": 2, "n": 2}, {"echo": True}])
def test_completions_have_the_published_shape(post, published, options: dict[str, Any]) -> None:
    request = {"prompt": ["a", "b"], "max_tokens": 4, **options}
    check_published(published, "CreateCompletionResponse", post("completions", **request).json())
    chunks = events(post("completions", **request, stream=True))
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        assert choice.keys() == {"index", "text", "logprobs", "finish_reason"}


def test_the_rest_has_the_published_shape(served, post, published) -> None:
    check_published(published, "ListModelsResponse", httpx.get(f"{served.url}/v1/models").json())
    check_published(published, "Model", httpx.get(f"{served.url}/v1/models/tiny").json())
    check_published(published, "ErrorResponse", post("completions").json())


def test_every_field_of_a_recorded_server_is_there(post, real_data: Path) -> None:
    """Except what is null there, and what a server without tools cannot have."""
    with tarfile.open(real_data / "serving" / "tgi_llama_snapshots.tar.gz") as archive:
        recorded = {
            Path(member.name).name: json.load(archive.extractfile(member)) for member in archive if member.isfile()
        }
    ours = {
        "test_flash_llama_completion_single_prompt.json": post("completions", prompt="x", max_tokens=3).json(),
        "test_flash_llama_completion_stream_usage.json": events(
            post(CHAT, messages=MESSAGES, max_tokens=3, stream=True, stream_options={"include_usage": True})
        ),
    }
    for name, body in ours.items():
        theirs = recorded[name]
        if isinstance(theirs, list):
            check_covers(theirs[-1], body[-1], at="usage")
            theirs, body = theirs[0], body[1]
        check_covers(theirs, body, at=name)


def check_covers(theirs: Any, ours: Any, at: str) -> None:
    if isinstance(theirs, dict):
        for key, value in theirs.items():
            if value is not None and key != "role":  # only our first chunk names the role, as OpenAI's
                check_covers(value, ours[key], f"{at}.{key}")
    elif isinstance(theirs, list) and theirs:
        check_covers(theirs[0], ours[0], f"{at}[0]")
    elif not isinstance(theirs, list):
        assert type(ours) is type(theirs), at
