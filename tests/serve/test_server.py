"""`puna serve` as a program."""

import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import httpx
import pytest

from puna.config import load_config, render_defaults
from puna.infer.load import EngineConfig
from puna.runtime.errors import InputError
from puna.serve.server import ServeConfig, listen, main


def test_a_taken_port_is_said_before_the_model_is_loaded(tmp_path: Path) -> None:
    with closing(listen("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            InputError,
            match=rf"Cannot listen on 127.0.0.1, port {port}: Address already in use.* choose a different port",
        ):
            main(ServeConfig(tmp_path / "no model here", port=port))


def test_impossible_addresses() -> None:
    with pytest.raises(InputError, match="port is 70000"):
        ServeConfig(Path("m"), port=70000)
    with pytest.raises(InputError, match=r"Cannot listen on 192\.0\.2\.1, port 0"):
        listen("192.0.2.1", 0)


def test_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(render_defaults(ServeConfig))
    config = load_config(ServeConfig, recipe, ["model=m", "engine.max_rows=2"])
    assert config == ServeConfig(Path("m"), engine=EngineConfig(max_rows=2))


def test_serving_from_start_to_interrupt(model_directory: Path) -> None:
    """Prints a curl line that works (its parts are used here), and ends cleanly on Ctrl-C."""
    program = (
        "import sys; from pathlib import Path; from puna.serve.server import *; "
        "main(ServeConfig(Path(sys.argv[1]), port=0, engine=EngineConfig(device='cpu', num_threads=1)))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(model_directory)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    try:
        assert process.stdout is not None
        assert "Serving tiny at http://127.0.0.1:" in process.stdout.readline()
        curl = re.fullmatch(r"curl (\S+) -H '([^']+): ([^']+)' -d '([^']+)'\n", process.stdout.readline())
        assert curl is not None
        url, header, value, body = curl.groups()
        answer = httpx.post(url, headers={header: value}, content=body, timeout=20)
        assert answer.json()["object"] == "chat.completion"
        with httpx.stream("POST", url, headers={header: value}, content=body[:-1] + ', "stream": true}') as stream:
            next(stream.iter_lines())
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=20) == 0
    finally:
        process.kill()
        _, errors = process.communicate()
    assert "Traceback" not in errors


def test_requests_that_run_too_long_are_told_that_the_server_ends(served) -> None:
    body = {"model": "tiny", "prompt": "x", "max_tokens": 4000, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{served.url}/v1/completions", json=body, timeout=20) as response:
        lines = response.iter_lines()
        next(lines)
        served.server.should_exit = True
        *_, last = (line for line in lines if line)
    assert "The server is shutting down." in last
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{served.url}/health")


def test_ipv6() -> None:
    if not socket.has_ipv6:
        pytest.skip("no IPv6")
    try:
        listener = listen("::1", 0)
    except InputError:
        pytest.skip("no IPv6 address on this machine")
    listener.close()
