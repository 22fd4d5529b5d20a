"""The HTTP application: routes, and the passage between requests and the engine's thread."""

import asyncio
import json
import math
import socket
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

import puna
from puna.infer.engine import Engine
from puna.infer.request import Delta
from puna.infer.sampling import SamplingParams
from puna.runtime.errors import InputError
from puna.serve import errors
from puna.serve.errors import ApiError
from puna.serve.guard import Answers, Guard, GuardedRun, Refused
from puna.serve.requests import ChatRequest, CompletionRequest, GenerationRequest
from puna.serve.responses import ChatReply, CompletionReply, Echo, Reply, join, model_card, usage_of
from puna.serve.worker import EngineFailed, Job, RequestFailed, Worker
from puna.tokenizer.chat import render_chat

_CLIENT_CLOSED_REQUEST = 499
"""Nobody reads it; the name is nginx's."""


def build_app(engine: Engine, name: str, guard: Guard | None = None) -> FastAPI:
    """The server as an ASGI application.

    Args:
        engine: belongs to the application from its start-up to its shutdown.
        name: how clients call the model; its adapters go by their own names.
        guard: judges prompts and answers; belongs to the application as the engine does.

    Raises:
        InputError: an adapter has the model's name.
    """
    if name in engine.adapters.names:
        raise InputError(f"The model and one of its adapters are both called {name!r}; choose another name for one.")
    worker = Worker(engine)
    started = int(time.time())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        worker.stop()
        await asyncio.to_thread(worker.join)
        if guard is not None:
            guard.close()

    app = FastAPI(title="Puna", version=puna.__version__, lifespan=lifespan)
    app.state.worker = worker
    errors.install(app)

    @app.get("/health")
    async def health() -> JSONResponse:
        report = {} if guard is None else {"guard": guard.report()}
        if not worker.alive:
            return JSONResponse({"status": "stopped", **report}, 503)
        return JSONResponse({"status": "ok", **report})

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model_card(each, started) for each in [name, *engine.adapters.names]]}

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        adapter_of(model)
        return model_card(model, started)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        adapter = adapter_of(body.model)
        prompts = [engine.encode(prompt) if isinstance(prompt, str) else prompt for prompt in body.prompts]
        check_prompts(prompts, body, body.params(0), "prompt")
        texts = [
            prompt if isinstance(prompt, str) else engine.tokenizer.decode(prompt, skip_special=True)
            for prompt in body.prompts
        ]
        echoes: list[Echo | None] = [None] * len(prompts)
        if body.echo:
            echoes = [Echo(text, ids) for text, ids in zip(texts, prompts, strict=True)]
        choices = [replace(body.params(choice), adapter=adapter) for choice in range(body.n or 1)]
        jobs = [Job(ids, params, new_text=False) for ids in prompts for params in choices]
        each = [echo for echo in echoes for _ in choices]
        reply = CompletionReply(engine, body.model, body.params(0), len(choices), each)
        return await respond(request, body, reply, jobs, texts, num_prompt_tokens=sum(map(len, prompts)))

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        adapter = adapter_of(body.model)
        messages = [message.plain() for message in body.messages]
        try:
            ids = render_chat(engine.tokenizer, messages, add_generation_prompt=True).ids
        except InputError as error:
            raise ApiError(400, str(error), param="messages") from error
        check_prompts([ids], body, body.params(0), "messages")
        jobs = [Job(ids, replace(body.params(choice), adapter=adapter), new_text=True) for choice in range(body.n or 1)]
        reply = ChatReply(engine, body.model, body.params(0), len(jobs))
        texts = [message["content"] for message in messages]
        return await respond(request, body, reply, jobs, texts, num_prompt_tokens=len(ids))

    def adapter_of(asked: str) -> str | None:
        """The adapter that a model's name stands for, or None for the bare model."""
        if asked != name and asked not in engine.adapters.names:
            known = ", ".join(map(repr, [name, *engine.adapters.names]))
            message = f"The model {asked!r} does not exist; this server has {known}."
            raise ApiError(404, message, param="model", code="model_not_found")
        return None if asked == name else asked

    def check_prompts(
        prompts: Sequence[Sequence[int]], body: GenerationRequest, params: SamplingParams, param: str
    ) -> None:
        if guard is not None and guard.config.answers and params.logprobs is not None:
            raise ApiError(
                400,
                "This server judges answers before they leave, and log-probabilities would show more.",
                param="logprobs",
            )
        for name, part in (
            ("logit_bias", SamplingParams(logit_bias=params.logit_bias)),
            ("stop_token_ids", SamplingParams(stop_ids=params.stop_ids)),
            (body.constrained_by, SamplingParams(constraint=params.constraint)),
        ):
            try:
                engine.check_params(part)
            except InputError as error:
                raise ApiError(400, str(error), param=name) from error
        for ids in prompts:
            try:
                engine.check(ids, params)
            except InputError as error:
                code = "context_length_exceeded" if len(ids) >= engine.max_context else None
                raise ApiError(400, str(error), param=param, code=code) from error

    async def open_run(jobs: Sequence[Job], texts: Sequence[str]) -> Answers:
        """The answers to prompts, which read `texts`."""
        if guard is None:
            return worker.open(jobs)
        if guard.config.prompts and not await guard.allows("prompts", texts):
            return Refused(len(jobs), guard.config.refusal)
        run = worker.open(jobs)
        return GuardedRun(run, guard, len(jobs)) if guard.config.answers else run

    async def respond(
        request: Request,
        body: GenerationRequest,
        reply: Reply,
        jobs: Sequence[Job],
        texts: Sequence[str],
        *,
        num_prompt_tokens: int,
    ) -> Response:
        try:
            run = await open_run(jobs, texts)
        except EngineFailed as error:
            raise _refusal(error, body) from error
        if body.stream:
            with_usage = body.stream_options is not None and body.stream_options.include_usage
            return EventStream(run, _events(run, body, reply, len(jobs), num_prompt_tokens if with_usage else None))
        try:
            answers = await _unless_disconnected(request, run, len(jobs))
        except (EngineFailed, RequestFailed) as error:
            raise _refusal(error, body) from error
        finally:
            run.close()
        if answers is None:
            return Response(status_code=_CLIENT_CLOSED_REQUEST)
        return JSONResponse(reply.whole(answers, num_prompt_tokens))

    return app


class Server(uvicorn.Server):
    """An HTTP server for an application made by `build_app`.

    Args:
        seconds_to_finish: how long running requests may go on after the server was told to end. Then they are broken
            off with an error that their clients can read.
    """

    def __init__(self, app: FastAPI, *, seconds_to_finish: float) -> None:
        # uvicorn's own, later limit would drop the connections: it is for clients that do not read.
        limit = math.ceil(seconds_to_finish) + 5
        super().__init__(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=limit))
        self._worker: Worker = app.state.worker
        self._seconds_to_finish = seconds_to_finish

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().call_later(self._seconds_to_finish, self._worker.stop)
        await super().shutdown(sockets)


class EventStream(StreamingResponse):
    """Server-sent events, after which the run is closed, however the connection ends."""

    def __init__(self, run: Answers, events: AsyncIterator[str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._run = run

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._run.close()


async def _events(
    run: Answers, body: GenerationRequest, reply: Reply, num_jobs: int, num_prompt_tokens: int | None
) -> AsyncIterator[str]:
    """The events of a stream; with the number of prompt tokens, one with the usage comes last."""
    no_usage = {} if num_prompt_tokens is None else {"usage": None}
    num_tokens = num_cached = 0
    for index in range(num_jobs):
        if (opening := reply.opening(index)) is not None:
            yield _event({**reply.chunk([opening]), **no_usage})
    try:
        async for index, delta in run.deltas():
            num_tokens += len(delta.ids)
            num_cached += reply.num_cached(index, delta)
            yield _event({**reply.chunk([reply.piece(index, delta)]), **no_usage})
    except (EngineFailed, RequestFailed) as error:
        yield _event(_refusal(error, body).body)
        return
    if num_prompt_tokens is not None:
        yield _event({**reply.chunk([]), "usage": usage_of(num_prompt_tokens, num_tokens, num_cached)})
    yield "data: [DONE]\n\n"


def _refusal(error: EngineFailed | RequestFailed, body: GenerationRequest) -> ApiError:
    if isinstance(error, EngineFailed):
        return ApiError(500, str(error))
    return ApiError(400, str(error), param=body.constrained_by)


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


async def _unless_disconnected(request: Request, run: Answers, num_jobs: int) -> list[Delta] | None:
    """Every job's answer in order, or None when the client has gone away before.

    Raises:
        EngineFailed: the answers will not be finished.
        RequestFailed: nor can they be.
    """

    async def collect() -> list[Delta]:
        parts: list[list[Delta]] = [[] for _ in range(num_jobs)]
        async for index, delta in run.deltas():
            parts[index].append(delta)
        return [join(part) for part in parts]

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    answer, watch = asyncio.create_task(collect()), asyncio.create_task(gone())
    try:
        await asyncio.wait((answer, watch), return_when=asyncio.FIRST_COMPLETED)
        return answer.result() if answer.done() else None
    finally:
        answer.cancel()
        watch.cancel()
