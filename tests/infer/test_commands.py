"""`puna generate` and `puna chat` on a model directory."""

import io
import json
import os
import signal
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from puna.config import load_config, render_defaults
from puna.infer import chat, generate
from puna.infer.chat import Chat, ChatConfig
from puna.infer.engine import Engine
from puna.infer.generate import GenerateConfig
from puna.infer.load import EngineConfig
from puna.infer.request import Delta
from puna.infer.sampling import SamplingParams
from puna.runtime.errors import InputError

ON_CPU = EngineConfig(device="cpu", num_threads=1, max_rows=2)
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def type_in(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))


def test_one_prompt_is_continued(model_directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate.main(GenerateConfig(model_directory, prompt="abc", sampling=GREEDY, engine=ON_CPU))
    single = capsys.readouterr().out
    assert single.startswith("abc")
    generate.main(GenerateConfig(model_directory, prompt="abc", json=True, sampling=GREEDY, engine=ON_CPU))
    line = json.loads(capsys.readouterr().out)
    assert line["prompt"] + line["text"] + "\n" == single
    assert (line["num_prompt_tokens"], line["finish_reason"]) == (4, "length")


def test_prompts_from_files_and_standard_input(
    model_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("one\n\ntwo\n")
    (tmp_path / "prompts.jsonl").write_text('"one"\n{"prompt": "two", "id": 3}\n')
    type_in(monkeypatch, "one\ntwo\n")
    outputs = []
    for prompts in (tmp_path / "prompts.txt", tmp_path / "prompts.jsonl", None):
        config = GenerateConfig(model_directory, prompts=prompts, json=True, sampling=GREEDY, engine=ON_CPU)
        generate.main(config)
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] == outputs[2]
    assert [json.loads(line)["prompt"] for line in outputs[0].splitlines()] == ["one", "two"]


def test_unusable_prompts(model_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="both given"):
        GenerateConfig(model_directory, prompt="a", prompts=tmp_path)
    (tmp_path / "bad.jsonl").write_text('"fine"\n{"text": "x"}\n')
    with pytest.raises(InputError, match=r'bad.jsonl, prompt 2: .* a string under "prompt"'):
        generate.main(GenerateConfig(model_directory, prompts=tmp_path / "bad.jsonl"))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="binary is not UTF-8"):
        generate.main(GenerateConfig(model_directory, prompts=tmp_path / "binary"))
    with pytest.raises(InputError, match="No such file"):
        generate.main(GenerateConfig(model_directory, prompts=tmp_path / "absent"))
    type_in(monkeypatch, "\n")
    with pytest.raises(InputError, match="no prompt in standard input"):
        generate.main(GenerateConfig(model_directory))


def test_chat_through_a_pipe(
    model_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "talk.json"
    lines = ["Hi!", "/retry", "How are you?", f"/save {saved}", "/quit", "never seen"]
    config = ChatConfig(model_directory, system="Be kind.", max_tokens=4, seed=3, engine=ON_CPU)
    outputs = []
    for _ in range(2):
        type_in(monkeypatch, "\n".join(lines))
        chat.main(config)
        outputs.append(capsys.readouterr())
    assert outputs[0].out == outputs[1].out
    assert "tokens/s" in outputs[0].err
    messages = json.loads(saved.read_text())["messages"]
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert [m["content"] for m in messages if m["role"] != "assistant"] == ["Be kind.", "Hi!", "How are you?"]
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    assert outputs[0].out.endswith("".join(answer + "\n" for answer in answers))
    assert len(outputs[0].out) > sum(map(len, answers)) + 2  # the first answer, before /retry


def test_chat_commands(engine: Engine, model_directory: Path, tmp_path: Path) -> None:
    talk = Chat(engine, ChatConfig(model_directory, max_tokens=2))
    with pytest.raises(InputError, match="no answer yet"):
        talk.take("/retry")
    with pytest.raises(InputError, match="no command /nonsense"):
        talk.take("/nonsense")
    with pytest.raises(InputError, match="name of a file"):
        talk.take("/save")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be saved"):
        talk.take(f"/save {tmp_path / 'file' / 'below'}")
    assert talk.take("/help")
    assert talk.take("")
    talk.take("x")
    talk.take("/system Be brief.")
    assert [message["role"] for message in talk.messages] == ["system", "user", "assistant"]
    talk.take("/clear")
    assert talk.messages == [{"role": "system", "content": "Be brief."}]
    talk.take("/system")
    assert talk.messages == []
    with pytest.raises(InputError, match=r"the context holds 64.*/clear starts afresh"):
        talk.take("long " * 20)
    assert talk.messages == []
    assert not talk.take("/quit")


def test_ctrl_c_ends_the_answer_but_not_the_chat(
    engine: Engine, model_directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engine.tokenizer, "stop_ids", frozenset())
    monkeypatch.setattr(sys, "stdin", Terminal())
    stream = engine.stream

    def interrupted(*args: Any, **options: Any) -> Generator[Delta, None, None]:
        for count, delta in enumerate(stream(*args, **options)):
            if count == 2:
                os.kill(os.getpid(), signal.SIGINT)
            yield delta

    monkeypatch.setattr(engine, "stream", interrupted)
    talk = Chat(engine, ChatConfig(model_directory))
    assert talk.take("hi")
    assert engine.idle
    assert [message["role"] for message in talk.messages] == ["user", "assistant"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    with pytest.raises(KeyboardInterrupt):
        talk.take("again")


def test_chat_in_a_terminal(
    model_directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = iter(["hello", KeyboardInterrupt(), "/oops", EOFError()])

    def typed(prompt: str) -> str:
        key = next(keys)
        if isinstance(key, BaseException):
            raise key
        return key

    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr("builtins.input", typed)
    chat.main(ChatConfig(model_directory, max_tokens=3, engine=ON_CPU))
    shown = capsys.readouterr().err
    assert "/help lists the commands" in shown
    assert "Ctrl-D leaves" in shown
    assert "no command /oops" in shown


def test_a_model_without_template_cannot_chat(
    model_directory: Path, monkeypatch: pytest.MonkeyPatch, engine: Engine
) -> None:
    monkeypatch.setattr(engine.tokenizer, "chat_template", None)
    monkeypatch.setattr(chat, "load_engine", lambda model, config: engine)
    with pytest.raises(InputError, match=r"no chat template.*use `puna generate`"):
        chat.main(ChatConfig(model_directory))


@pytest.mark.parametrize("kind", [GenerateConfig, ChatConfig])
def test_recipes(kind: type, tmp_path: Path) -> None:
    """The printed defaults are a recipe that gives the defaults, and every field is explained."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(render_defaults(kind))
    assert load_config(kind, recipe, ["model=some/model"]) == kind(Path("some/model"))
    previous = ""
    for line in recipe.read_text().splitlines():
        if ("=" in line and not line.startswith("# ")) or line.endswith(("(absent)", "(required)")):
            assert previous.startswith("# "), line
        previous = line
    with pytest.raises(InputError, match="temperature"):
        load_config(kind, None, ["model=m", f"{'' if kind is ChatConfig else 'sampling.'}temperature=-1.0"])
