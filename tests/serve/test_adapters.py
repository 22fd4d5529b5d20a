"""Adapters as models of their own beside the one below them."""

import threading
from contextlib import closing

import httpx
import pytest
import torch

from puna.infer.config import EngineConfig
from puna.infer.engine import Engine
from puna.infer.sampling import SamplingParams
from puna.model.transformer import Transformer
from puna.peft.apply import adapted_maps, attach
from puna.peft.files import save_adapter
from puna.peft.lora import LoRAConfig
from puna.runtime.errors import InputError
from puna.serve.app import Server, build_app
from puna.serve.server import listen


@pytest.fixture(scope="module")
def engine(model, tokenizer, tmp_path_factory):
    copy = Transformer(model.config).eval()
    copy.load_state_dict(model.state_dict())
    attach(copy, LoRAConfig(rank=2))
    for adapted in adapted_maps(copy).values():
        adapted.lora_b.data.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    directory = tmp_path_factory.mktemp("adapters") / "pirate"
    save_adapter(copy, LoRAConfig(rank=2), directory)
    base = Transformer(model.config).eval()
    base.load_state_dict(model.state_dict())
    return Engine(base, tokenizer, EngineConfig(max_rows=4, max_context=128, adapters={"pirate": directory}))


@pytest.fixture(scope="module")
def client(engine):
    with closing(listen("127.0.0.1", 0)) as listener:
        server = Server(build_app(engine, "tiny"), seconds_to_finish=0.2)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        with httpx.Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}/v1", timeout=20) as client:
            yield client
        server.should_exit = True
        thread.join(timeout=20)


def test_models_are_listed(client):
    assert [card["id"] for card in client.get("/models").json()["data"]] == ["tiny", "pirate"]
    assert client.get("/models/pirate").json()["id"] == "pirate"


def test_the_model_names_the_adapter(client, engine):
    answers = {}
    for name in ("tiny", "pirate"):
        body = {"model": name, "prompt": "Ahoy", "temperature": 0, "max_tokens": 12, "ignore_eos": True}
        reply = client.post("/completions", json=body).json()
        assert reply["model"] == name
        answers[name] = reply["choices"][0]["text"]
    assert answers["tiny"] != answers["pirate"]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, adapter="pirate")
    assert engine.generate([engine.encode("Ahoy")], params)[0].text == answers["pirate"]


def test_streams_name_it_too(client):
    body = {"model": "pirate", "messages": [{"role": "user", "content": "Ahoy"}], "max_tokens": 3, "stream": True}
    with client.stream("POST", "/chat/completions", json=body) as reply:
        assert '"model": "pirate"' in reply.read().decode()


def test_an_unknown_name_is_not_found(client):
    reply = client.post("/completions", json={"model": "parrot", "prompt": "Ahoy"})
    assert reply.status_code == 404
    assert reply.json()["error"]["code"] == "model_not_found"
    assert "'tiny', 'pirate'" in reply.json()["error"]["message"]
    assert client.get("/models/parrot").status_code == 404


def test_an_adapter_of_the_models_own_name_is_refused(engine):
    with pytest.raises(InputError, match="both called 'pirate'"):
        build_app(engine, "pirate")
