"""Refusals in OpenAI's shape."""

import difflib
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from puna.serve.requests import IDLE, ChatRequest, CompletionRequest


class ApiError(Exception):
    """A request that cannot be answered, and the HTTP status that says so.

    Args:
        param: the parameter at fault, where there is one.
        code: a word for programs, where the protocol has one.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def install(app: FastAPI) -> None:
    """Make every refusal of `app`, its framework's own included, an `ApiError`."""

    @app.exception_handler(ApiError)
    def answer(request: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body, error.status)

    @app.exception_handler(RequestValidationError)
    def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return answer(request, explain(error.errors()))

    @app.exception_handler(HTTPException)
    def refused(request: Request, error: HTTPException) -> JSONResponse:
        return answer(request, ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}."))


def explain(problems: Sequence[Any]) -> ApiError:
    """One error from pydantic's list: about the first parameter at fault, and all that is wrong with it."""
    first = problems[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"The body is not valid JSON: {first['ctx']['error']}.")
    if len(first["loc"]) < 2:
        return ApiError(400, f"The body is refused: {_message(first)}.")
    name = str(first["loc"][1])
    if first["type"] == "extra_forbidden" and len(first["loc"]) == 2:
        return _unknown(name)
    about = [problem for problem in problems if problem["loc"][:2] == first["loc"][:2]]
    reasons = dict.fromkeys(_message(problem) for problem in about)
    return ApiError(400, f"{name}: {'; or '.join(reasons)}.", param=name)


def _unknown(name: str) -> ApiError:
    if name in IDLE:
        also = "".join(f" or send {value!r}" for value in IDLE[name])
        message = f"{name} is not supported; leave it out{also}."
        return ApiError(400, message, param=name, code="unsupported_parameter")
    near = difflib.get_close_matches(name, {*CompletionRequest.model_fields, *ChatRequest.model_fields}, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    return ApiError(400, f"There is no parameter {name}.{hint}", param=name, code="unknown_parameter")


def _message(problem: Any) -> str:
    """What is wrong, after the place inside the parameter where that is, such as [0].role."""
    parts = problem["loc"][2:]
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
    text = str(problem["msg"]).removeprefix("Value error, ")
    # Without a number the parts name the alternatives of a union, which says nothing to a client.
    return f"{where} {text}" if any(isinstance(part, int) for part in parts) else text
