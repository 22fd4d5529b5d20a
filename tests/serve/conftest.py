"""A tiny model behind a real server on a free port of this machine."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from puna.infer.config import EngineConfig
from puna.infer.engine import Engine
from puna.infer.request import Request
from puna.model.config import LlamaConfig
from puna.model.initialize import initialize
from puna.model.transformer import Transformer
from puna.serve.app import Server, build_app
from puna.serve.guard import Guard
from puna.serve.server import listen
from puna.tokenizer.base import Tokenizer
from puna.tokenizer.chat_template import builtin_template
from puna.tokenizer.tiktoken_ranks import TiktokenTokenizer
from puna.weights.load import save_model

SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>", "<|im_start|>", "<|im_end|>")


class WatchedEngine(Engine):
    """Keeps the largest number of sequences that one step advanced and what was given up; breaks down on request."""

    widest = 0
    num_cancelled = 0
    broken = False

    def step(self) -> list[Request]:
        if self.broken:
            self.broken = False
            raise RuntimeError("a fault on purpose")
        updated = super().step()
        self.widest = max(self.widest, len(self.scheduler.running))
        return updated

    def cancel(self, request: Request) -> None:
        self.num_cancelled += request.finish_reason is None
        super().cancel(request)


@dataclass
class Served:
    engine: WatchedEngine
    url: str
    server: Server

    def wait_until_idle(self, seconds: float = 60) -> bool:
        deadline = time.monotonic() + seconds
        while not self.engine.idle and time.monotonic() < deadline:
            time.sleep(0.01)
        return self.engine.idle


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """Its tokens are bytes."""
    special = {name: 256 + i for i, name in enumerate(SPECIAL)}
    tokenizer = TiktokenTokenizer({bytes([i]): i for i in range(256)}, "llama3", special)
    tokenizer.chat_template = builtin_template("chatml")
    return tokenizer


@pytest.fixture(scope="session")
def model() -> Transformer:
    config = LlamaConfig(260, 32, 2, 4, 2, 8, 48, context_length=4096)
    model = Transformer(config)
    initialize(model, seed=1)
    return model.eval()


@pytest.fixture(scope="session")
def model_directory(model: Transformer, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    save_model(model, directory, tokenizer=tokenizer)
    return directory


Serve = Callable[..., AbstractContextManager[Served]]


@pytest.fixture(scope="session")
def serve(model: Transformer, tokenizer: Tokenizer) -> Serve:
    """Start a server, with a guard or without, and end it after."""

    @contextmanager
    def start(guard: Guard | None = None) -> Iterator[Served]:
        engine = WatchedEngine(model, tokenizer, EngineConfig(max_rows=4))
        with closing(listen("127.0.0.1", 0)) as listener:
            server = Server(build_app(engine, "tiny", guard), seconds_to_finish=0.2)
            thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
            thread.start()
            yield Served(engine, f"http://127.0.0.1:{listener.getsockname()[1]}", server)
            server.should_exit = True
            thread.join(timeout=20)
            assert not thread.is_alive()
            assert not {"puna-engine", "puna-guard_0"} & {thread.name for thread in threading.enumerate()}

    return start


@pytest.fixture(scope="module")
def served(serve: Serve) -> Iterator[Served]:
    with serve() as served:
        yield served


@pytest.fixture
def post(served: Served) -> Iterator[Callable[..., httpx.Response]]:
    """Send a body to an endpoint; the model is filled in."""
    with httpx.Client(base_url=served.url, timeout=20) as client:
        yield lambda path, **body: client.post(f"/v1/{path}", json={"model": "tiny", **body})
