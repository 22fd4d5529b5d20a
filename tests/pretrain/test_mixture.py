"""`puna pretrain` on a mixture: one source alone is bitwise what it was; several are mixed, counted and resumed."""

import json
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from puna.batches.mixture import MixtureConfig, MixtureSource
from puna.pretrain.main import PretrainConfig, main
from puna.runtime.errors import InputError
from puna.runtime.manifest import Manifest
from puna.train import loop
from puna.train.metrics import read_metrics


def losses(output: Path) -> list[float]:
    return [row["train/loss"] for row in read_metrics(output / "metrics.jsonl")]


def test_a_mixture_of_one_source_gives_its_losses_to_the_bit(config: PretrainConfig, tmp_path: Path) -> None:
    torch.manual_seed(0)
    main(config)
    assert config.tokens is not None
    mixture = MixtureConfig((MixtureSource("only", config.tokens, 0.3),))
    main(replace(config, tokens=None, mixture=mixture, output=tmp_path / "mixed"))
    assert losses(tmp_path / "mixed") == losses(config.output)


def test_a_mixture_is_counted_and_goes_on_after_an_interruption(
    config: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = (
        MixtureSource("a", tmp_path / "a", 3),
        MixtureSource("b", tmp_path / "b", 1, annealing_proportion=9),
    )
    config = replace(config, tokens=None, mixture=MixtureConfig(sources, annealing_share=0.25))
    main(config)
    manifest = Manifest.read(config.output / "model")
    # 24 rows at 3 : 1, then 8 at 3 : 9; 56 rows of 32 tokens in each source
    assert manifest.results["epochs"] == {"a": (18 + 2) / 56, "b": (6 + 6) / 56}
    assert str(tmp_path / "a") in manifest.inputs
    assert str(tmp_path / "b") in manifest.inputs

    original, calls = loop.train_step, []

    def interrupted(*arguments):  # type: ignore[no-untyped-def]
        calls.append(arguments[0].step)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(loop, "train_step", interrupted)
    again = replace(config, output=tmp_path / "again")
    with pytest.raises(KeyboardInterrupt):
        main(again)
    main(again)
    assert calls == [0, 1, 2, 3, 4, 5, 4, 5, 6, 7]
    assert losses(again.output) == losses(config.output)


def test_mistakes_are_explained(config: PretrainConfig, tmp_path: Path) -> None:
    mixture = MixtureConfig((MixtureSource("a", tmp_path / "a", 1),), max_epochs=0.1)
    with pytest.raises(ValueError, match="Set either tokens"):
        replace(config, mixture=mixture)
    with pytest.raises(ValueError, match="Set either tokens"):
        replace(config, tokens=None)
    with pytest.raises(InputError, match=r"go over a 0\.6 times"):
        main(replace(config, tokens=None, mixture=mixture))


def test_the_shipped_llama_1_mixture_is_the_paper_s(real_data: Path) -> None:
    recipe = Path(__file__).parents[2] / "recipes" / "curate" / "llama1_mixture.toml"
    mixture = tomllib.loads(recipe.read_text())["pretrain"]["mixture"]
    paper = json.loads((real_data / "reference" / "llama1_paper_tables.json").read_text())["data_mix"]
    assert {source["name"]: source["proportion"] for source in mixture["sources"]} == {
        row["dataset"]: row["sampling_prop"] for row in paper
    }
    assert mixture["max_epochs"] > max(row["epochs_on_1.4T"] for row in paper)
