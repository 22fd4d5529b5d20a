"""`puna serve`: a model behind OpenAI's protocol."""

import json
import shlex
import socket
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from puna.infer.load import EngineConfig, load_engine
from puna.runtime.errors import InputError
from puna.runtime.listen import address_of, check_port
from puna.runtime.listen import listen as listen
from puna.serve.guard import Guard, GuardConfig

_SECONDS_TO_FINISH = 5


@dataclass(frozen=True)
class ServeConfig:
    """Which model is served, and where."""

    model: Path
    """Model directory."""
    name: str | None = None
    """How clients call the model; absent is the directory's name. Each of engine.adapters is a model of its own name
    beside it."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is every network interface. There are no keys yet: whoever can reach it can
    use it."""
    port: int = 8000
    """TCP port; 0 takes any free one."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """Where it computes, and for how many requests at once (max_rows)."""
    guard: GuardConfig | None = None
    """A classifier that judges prompts and answers, and refuses them: guard.model."""

    def __post_init__(self) -> None:
        check_port(self.port)


def main(config: ServeConfig) -> None:
    """Serve until interrupted; requests that are running then have a few seconds to finish.

    Raises:
        InputError: the address is not to be had (found out before the model is loaded), or the model cannot be
            loaded, or the packages for serving are not installed.
    """
    try:
        from puna.serve.app import Server, build_app
    except ModuleNotFoundError as error:
        raise InputError(f"Serving needs the package {error.name}: pip install 'puna[serve]'.") from error

    with closing(listen(config.host, config.port)) as listener:
        name = config.name or config.model.resolve().name
        guard = None if config.guard is None else Guard(config.guard)
        engine = load_engine(config.model, config.engine)
        server = Server(build_app(engine, name, guard), seconds_to_finish=_SECONDS_TO_FINISH)
        _announce(name, listener, chat=engine.tokenizer.chat_template is not None)
        with suppress(KeyboardInterrupt):
            server.run(sockets=[listener])


def _announce(name: str, listener: socket.socket, *, chat: bool) -> None:
    base = f"{address_of(listener)}/v1"
    if chat:
        path, turns = "chat/completions", [{"role": "user", "content": "Hello!"}]
        body: dict[str, object] = {"model": name, "messages": turns}
    else:
        path, body = "completions", {"model": name, "prompt": "Once upon a time", "max_tokens": 50}
    command = f"curl {base}/{path} -H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body))}"
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(f"Serving {name} at {base}. Ctrl-C stops. Try:\n{command}")
