"""The shipped recipes for continued pretraining and for several objectives run, at a size of seconds."""

from pathlib import Path

import pytest
import torch

from puna.model.initialize import initialize
from puna.model.presets import LlamaConfig
from puna.model.transformer import Transformer
from puna.pipeline.run import run_recipe
from puna.runtime.files import write_jsonl
from puna.runtime.manifest import Manifest
from puna.tokenizer.load import load_tokenizer
from puna.tokenizer.train import TokenizerConfig
from puna.tokenizer.train import main as train_tokenizer
from puna.weights.load import load_model, save_model

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
SMALL = [
    "pretrain.train.device=cpu",
    "pretrain.train.num_threads=1",
    "pretrain.train.tensorboard=false",
    "pretrain.train.optimizer.kind=adamw",
    "pretrain.train.batch_rows=2",
    "pretrain.train.micro_batch_rows=2",
    "pretrain.train.row_length=32",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Text files of two kinds, and a model that was trained on the first."""
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        for number in range(40):
            text = f"{name} changelog {number} of the llama. " * 12
            (tmp_path / name / f"{number}.txt").write_text(text, encoding="utf-8")
    old = [{"id": str(n), "text": f"old changelog {n} of the llama. " * 12} for n in range(40)]
    write_jsonl(tmp_path / "old.jsonl", old)
    train_tokenizer(TokenizerConfig(documents=tmp_path / "old.jsonl", output=tmp_path / "tokenizer", vocab_size=270))
    model = Transformer(
        LlamaConfig(
            vocab_size=320,
            dim=16,
            num_layers=2,
            num_heads=2,
            num_kv_heads=2,
            head_dim=8,
            hidden_dim=24,
            context_length=512,
        )
    )
    initialize(model, 0)
    save_model(model, tmp_path / "model", tokenizer=load_tokenizer(tmp_path / "tokenizer"))
    return tmp_path


def test_continued_pretraining(folder: Path) -> None:
    pytest.importorskip("matplotlib")
    output = folder / "run"
    run_recipe(
        RECIPES / "continue.toml",
        [
            *SMALL,
            f"output={output}",
            f"corpus.source={folder / 'new'}",
            "corpus.workers=1",
            f"extended.model={folder / 'model'}",
            f"old_tokens.documents={folder / 'old.jsonl'}",
            f"old_quality.documents={folder / 'old.jsonl'}",
            "pretrain.mixture.max_epochs=100",
            "pretrain.train.steps=20",
            "pretrain.train.checkpoint_every=1",
            "pretrain.train.schedule.warmup_steps=2",
            "pretrain.train.schedule.decay_steps=4",
            "new_quality.num_samples=0",
            "old_quality.num_samples=0",
            "long_context.lengths=[256]",
            "long_context.trials=1",
        ],
    )
    results = Manifest.read(output / "pretrain" / "model").results
    # 32 rows at 3 : 1, then 8 at 19 : 1, of 40 documents each side; a prefix has its share to within one row
    assert results["epochs"]["new"] > 2 * results["epochs"]["old"] > 0
    model = load_model(output / "averaged")
    assert (model.config.context_length, model.config.rope_scaling.factor) == (1024, 2)
    assert load_tokenizer(output / "averaged").vocab_size == 273 == load_tokenizer(output / "extended").vocab_size
    assert Manifest.read(output / "averaged").results["num_averaged"] == 4
    assert Manifest.read(output / "old_quality").results["bits_per_byte"] > 0
    assert (output / "long_context" / "needle.html").exists()


def test_several_objectives(folder: Path) -> None:
    output = folder / "run"
    run_recipe(
        RECIPES / "objectives.toml",
        [
            *SMALL,
            f"output={output}",
            f"corpus.source={folder / 'new'}",
            "corpus.workers=1",
            "tokenizer.vocab_size=270",
            *(f"pretrain.model.{name}={value}" for name, value in (("dim", 24), ("hidden_dim", 32), ("head_dim", 8))),
            "pretrain.train.steps=6",
            "pretrain.train.schedule.warmup_steps=2",
        ],
    )
    with torch.no_grad():
        assert load_model(output / "pretrain" / "model")(torch.arange(5)[None]).shape == (1, 5, 4032)
    assert load_tokenizer(output / "pretrain" / "model").special_tokens["<|mask|>"] == 270
