"""Needle in a haystack: prompts are what they should be, and the score is what generating would say."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.evaluate.needle import NeedleConfig, Prompt, main, make_prompt, score
from puna.model.config import LlamaConfig
from puna.model.initialize import initialize
from puna.model.transformer import Transformer
from puna.runtime.errors import InputError
from puna.runtime.files import write_jsonl
from puna.runtime.manifest import Manifest
from puna.tokenizer.load import load_tokenizer
from puna.tokenizer.train import TokenizerConfig
from puna.tokenizer.train import main as train_tokenizer
from puna.weights.load import save_model

SMALL = LlamaConfig(
    vocab_size=320, dim=16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8, hidden_dim=24, context_length=1024
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("needle")
    write_jsonl(root / "d.jsonl", [{"id": str(n), "text": f"The llamas of {n} graze. " * 9} for n in range(50)])
    train_tokenizer(TokenizerConfig(documents=root / "d.jsonl", output=root / "tokenizer", vocab_size=270))
    model = Transformer(SMALL)
    initialize(model, 0)
    save_model(model, root / "model", tokenizer=load_tokenizer(root / "tokenizer"))
    return root


def config_of(folder: Path) -> NeedleConfig:
    return NeedleConfig(
        model=folder / "model", documents=folder / "d.jsonl", output=folder / "out", device="cpu", num_threads=1
    )


@given(st.integers(130, 400), st.sampled_from([0.0, 0.1, 0.5, 1.0]), st.integers(0, 9))
@settings(max_examples=50, deadline=None)
def test_a_prompt_has_its_length_and_its_needle_at_its_depth(
    folder: Path, length: int, depth: float, trial: int
) -> None:
    tokenizer = load_tokenizer(folder / "tokenizer")
    config = config_of(folder)
    haystack = tokenizer.encode("Grass. " * 50)
    prompt = make_prompt(tokenizer, haystack, config, length, depth, trial)
    assert len(prompt.ids) == length
    assert prompt == make_prompt(tokenizer, haystack, config, length, depth, trial)
    text = tokenizer.decode(prompt.ids, skip_special=True)
    answer = tokenizer.decode(prompt.answer)
    city = text.rsplit(" of ", 1)[1].removesuffix(" is")
    needle = f"\nThe secret number of {city} is{answer}.\n"
    assert text.count(needle) == 1
    assert text.endswith(f"\nThe secret number of {city} is")
    before = len(tokenizer.encode(text[: text.index(needle)]))
    room = length - 1 - len(tokenizer.encode(needle)) - len(tokenizer.encode(needle.split(answer)[0]))
    assert abs(before - depth * room) <= 3  # the cut text may be split into other pieces at the seam


def test_the_score_is_what_greedy_decoding_says(folder: Path) -> None:
    model = Transformer(SMALL)
    initialize(model, 1)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(270, (40,), generator=generator).tolist()
    grown = list(ids)
    with torch.no_grad():
        for _ in range(4):
            grown.append(int(model(torch.tensor([grown]))[0, -1].argmax()))
    answer = grown[40:]
    assert score(model, Prompt(ids, answer))[0]
    for place in range(4):
        wrong = [*answer]
        wrong[place] = (wrong[place] + 1) % 270
        found, nats = score(model, Prompt(ids, wrong))
        assert not found
    with torch.no_grad():
        logits = model(torch.tensor([ids + wrong[:-1]]))[0, 39:].log_softmax(-1)
    assert nats == pytest.approx(-logits[range(4), wrong].mean().item(), rel=1e-5)


def test_the_stage_writes_table_plot_and_manifest(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    main(replace(config_of(folder), depths=(0.0, 1.0), trials=2))
    cells = json.loads((folder / "out" / "results.json").read_text())
    assert [(cell["length"], cell["depth"]) for cell in cells] == [(n, d) for n in (256, 512, 1024) for d in (0, 1)]
    page = (folder / "out" / "needle.html").read_text()
    assert "<svg" in page
    assert page.count("<td class") == 6
    assert Manifest.read(folder / "out").results["needle_recall"] == 0


def test_mistakes_are_explained(folder: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(InputError, match="A length of 20 tokens has no room"):
        main(replace(config_of(folder), lengths=(20,)))
    with pytest.raises(ValueError, match=r"needle lacks \{number\}"):
        replace(config_of(folder), needle="{city}")
    with pytest.raises(ValueError, match="between 0 and 1"):
        replace(config_of(folder), depths=(2.0,))
