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

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise InputError(f"port is {self.port}; a TCP port is between 1 and 65535, or 0 for any free one.")


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
        engine = load_engine(config.model, config.engine)
        server = Server(build_app(engine, name), seconds_to_finish=_SECONDS_TO_FINISH)
        _announce(name, listener, chat=engine.tokenizer.chat_template is not None)
        with suppress(KeyboardInterrupt):
            server.run(sockets=[listener])


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; clients that come before the server is ready wait.

    Raises:
        InputError: the port is taken, or the address cannot be used.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise InputError(
            f"Cannot listen on {host}, port {port}: {error.strerror}. If another program has the port, perhaps "
            "another `puna serve`, end it, or choose a different port: --set port=0 takes any that is free."
        ) from error


def _announce(name: str, listener: socket.socket, *, chat: bool) -> None:
    host, port = listener.getsockname()[:2]
    base = f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"
    if chat:
        path, turns = "chat/completions", [{"role": "user", "content": "Hello!"}]
        body: dict[str, object] = {"model": name, "messages": turns}
    else:
        path, body = "completions", {"model": name, "prompt": "Once upon a time", "max_tokens": 50}
    command = f"curl {base}/{path} -H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body))}"
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(f"Serving {name} at {base}. Ctrl-C stops. Try:\n{command}")
