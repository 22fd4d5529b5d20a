"""Stages that train: what they refuse before the first step, and that they learn."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from puna.batches.tokenize import TokenizeConfig
from puna.batches.tokenize import main as tokenize
from puna.finetune.main import FinetuneConfig
from puna.finetune.main import main as finetune
from puna.infer.engine import Engine
from puna.infer.sampling import SamplingParams
from puna.model.config import LlamaConfig
from puna.pretrain.main import PretrainConfig
from puna.pretrain.main import main as pretrain
from puna.runtime.errors import InputError
from puna.runtime.files import read_json, write_jsonl
from puna.runtime.manifest import Manifest
from puna.tokenizer.chat import render_chat
from puna.tokenizer.load import load_tokenizer
from puna.tokenizer.train import TokenizerConfig
from puna.tokenizer.train import main as train_tokenizer
from puna.train.config import OptimizerConfig, ScheduleConfig, TrainConfig
from puna.weights.load import load_model

MODEL = LlamaConfig(
    vocab_size=320, dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, hidden_dim=64, context_length=64
)
TRAIN = TrainConfig(
    steps=5,
    batch_rows=4,
    micro_batch_rows=4,
    row_length=64,
    device="cpu",
    num_threads=1,
    tensorboard=False,
    optimizer=OptimizerConfig(learning_rate=5e-3),
    schedule=ScheduleConfig(warmup_steps=2),
)
ANSWERS = {"red": "Llamas like hay.", "blue": "The herd sleeps.", "green": "Shear in spring."}


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """Documents, a tokenizer, shards, conversations."""
    text = " ".join(f"{color}: {answer}" for color, answer in ANSWERS.items())
    write_jsonl(tmp_path / "docs.jsonl", ({"id": str(n), "text": f"{n} {text} " * 8} for n in range(30)))
    train_tokenizer(TokenizerConfig(documents=tmp_path / "docs.jsonl", output=tmp_path / "tok", vocab_size=290))
    tokenize(TokenizeConfig(tmp_path / "docs.jsonl", tmp_path / "tok", tmp_path / "tokens"))
    write_jsonl(
        tmp_path / "chats.jsonl",
        (
            {"messages": [{"role": "user", "content": color}, {"role": "assistant", "content": answer}]}
            for color, answer in ANSWERS.items()
        ),
    )
    return tmp_path


@pytest.fixture
def pretrain_config(workplace: Path) -> PretrainConfig:
    return PretrainConfig(
        tokens=workplace / "tokens",
        tokenizer=workplace / "tok",
        output=workplace / "base",
        held_out_tokens=workplace / "tokens",
        model=MODEL,
        train=TRAIN,
    )


def test_a_model_learns_its_answers_by_heart(workplace: Path, pretrain_config: PretrainConfig) -> None:
    pretrain(pretrain_config)
    base = Manifest.read(workplace / "base" / "model")
    assert base.results["steps"] == 5
    assert base.config["model"]["dim"] == 32
    finetune(
        FinetuneConfig(
            model=workplace / "base" / "model",
            conversations=workplace / "chats.jsonl",
            output=workplace / "chat",
            held_out_conversations=workplace / "chats.jsonl",
            dtype="bfloat16",
            train=replace(TRAIN, steps=120),
        )
    )
    model = load_model(workplace / "chat" / "model")
    assert next(model.parameters()).dtype == torch.bfloat16
    tokenizer = load_tokenizer(workplace / "chat" / "model")
    engine = Engine(model, tokenizer)
    for color, answer in ANSWERS.items():
        prompt = render_chat(tokenizer, [{"role": "user", "content": color}], add_generation_prompt=True)
        [completion] = engine.generate([prompt.ids], SamplingParams(temperature=0, max_tokens=30))
        assert (completion.text, completion.finish_reason) == (answer, "stop")


def _edited(config: dict[str, Any]) -> Callable[[Any], Any]:
    return lambda value: replace(value, **config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_edited({"model": replace(MODEL, vocab_size=289)}), "290 ids .*vocab_size is only 289"),
        (_edited({"train": replace(TRAIN, row_length=65)}), "longer than the model.s context_length"),
        (_edited({"tokens": Path("absent")}), "does not exist"),
        (_edited({"tokenizer": Path("absent")}), "absent"),
    ],
)
def test_pretraining_refuses(pretrain_config: PretrainConfig, change: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        pretrain(change(pretrain_config))
    assert not pretrain_config.output.exists()


def test_tokens_of_another_tokenizer_are_refused(workplace: Path, pretrain_config: PretrainConfig) -> None:
    train_tokenizer(TokenizerConfig(documents=workplace / "docs.jsonl", output=workplace / "other", vocab_size=285))
    with pytest.raises(InputError, match="made by another tokenizer"):
        pretrain(replace(pretrain_config, tokenizer=workplace / "other"))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no conversation"),
        ([{"text": "x"}], "line 1 is not a conversation: it has text"),
        (
            [{"messages": [{"role": "user", "content": "only a question"}]}],
            r"no token is supervised \(1 of 1, the first is .*bad.jsonl, line 1\)",
        ),
        ([{"messages": [{"role": "robot", "content": "x"}]}], "line 1: .*robot"),
    ],
)
def test_conversations_that_cannot_be_trained_on(
    workplace: Path, pretrain_config: PretrainConfig, rows: list[dict[str, Any]], message: str
) -> None:
    pretrain(pretrain_config)
    write_jsonl(workplace / "bad.jsonl", rows)
    config = FinetuneConfig(
        model=workplace / "base" / "model",
        conversations=workplace / "bad.jsonl",
        output=workplace / "chat",
        train=TRAIN,
    )
    with pytest.raises(InputError, match=message):
        finetune(config)
    assert not (workplace / "chat" / "model").exists()


def test_a_model_without_template_is_refused(workplace: Path, pretrain_config: PretrainConfig) -> None:
    pretrain(pretrain_config)
    model = workplace / "base" / "model"
    settings = read_json(model / "tokenizer_config.json")
    settings.pop("chat_template", None)
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    (model / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(InputError, match=r"no chat template.*chat_template=llama3"):
        finetune(
            FinetuneConfig(model=model, conversations=workplace / "chats.jsonl", output=workplace / "chat", train=TRAIN)
        )


def test_empty_documents_are_refused(workplace: Path) -> None:
    write_jsonl(workplace / "empty.jsonl", [{"id": "a", "text": ""}])
    with pytest.raises(InputError, match="holds no text"):
        tokenize(TokenizeConfig(workplace / "empty.jsonl", workplace / "tok", workplace / "none"))
    write_jsonl(workplace / "wrong.jsonl", [{"text": "a"}])
    with pytest.raises(InputError, match='needs a string "text" and "id"'):
        tokenize(TokenizeConfig(workplace / "wrong.jsonl", workplace / "tok", workplace / "none"))
    assert not (workplace / "none").exists()
