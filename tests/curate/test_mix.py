"""`puna mix`: the mixture that resembles the held-out text wins; what is done is not done again."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from puna.batches.mixture import MixtureConfig, MixtureSource
from puna.batches.shards import ShardWriter
from puna.curate.mix import Candidate, HeldOutSet, MixConfig, MixSource, Trial, _mixture, main, rank
from puna.model.config import LlamaConfig
from puna.runtime.errors import InputError
from puna.runtime.files import read_json, write_jsonl
from puna.runtime.manifest import Manifest
from puna.tokenizer.load import load_tokenizer
from puna.tokenizer.train import TokenizerConfig
from puna.tokenizer.train import main as train_tokenizer
from puna.train.config import OptimizerConfig, ScheduleConfig, TrainConfig


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of two languages of numbers, one counting up, one counting down, a training and a held-out set of each."""
    folder = tmp_path_factory.mktemp("mix")
    write_jsonl(folder / "d.jsonl", [{"id": str(n), "text": f"llama {n} alpaca {n * 7} " * 9} for n in range(50)])
    train_tokenizer(TokenizerConfig(documents=folder / "d.jsonl", output=folder / "tokenizer", vocab_size=270))
    tokenizer = load_tokenizer(folder / "tokenizer")
    generator = np.random.default_rng(0)
    for name, step, documents in (("up", 1, 150), ("down", -1, 50), ("up_held", 1, 12), ("down_held", -1, 12)):
        (folder / name).mkdir()
        with ShardWriter(folder / name, tokenizer.vocab_size) as writer:
            for number in range(documents):
                start = int(generator.integers(60))
                ids = [(start + step * place) % 60 for place in range(40)]
                assert tokenizer.bos_id is not None
                writer.add([tokenizer.bos_id, *ids], f"{name}{number}", 40)
        Manifest("tokenize", {}, {}, writer.results(tokenizer.hash)).write(folder / name)
    return folder


@pytest.fixture
def config(data: Path, tmp_path: Path) -> MixConfig:
    return MixConfig(
        output=tmp_path / "mix",
        tokenizer=data / "tokenizer",
        sources=(MixSource("up", data / "up"), MixSource("down", data / "down")),
        held_out=(HeldOutSet("rising", data / "up_held"), HeldOutSet("falling", data / "down_held", weight=0.0)),
        candidates=(
            Candidate("mostly down", {"up": 0.1, "down": 0.9}),
            Candidate("mostly up", {"up": 0.9, "down": 0.1}),
        ),
        max_epochs=100,
        max_held_out_tokens=200,
        model=LlamaConfig(
            vocab_size=320,
            dim=16,
            num_layers=1,
            num_heads=2,
            num_kv_heads=2,
            head_dim=8,
            hidden_dim=24,
            context_length=32,
        ),
        train=TrainConfig(
            steps=25,
            batch_rows=10,
            micro_batch_rows=10,
            row_length=32,
            device="cpu",
            num_threads=1,
            tensorboard=False,
            optimizer=OptimizerConfig(learning_rate=2e-2),
            schedule=ScheduleConfig(warmup_steps=3),
        ),
    )


def test_the_resembling_mixture_wins_and_a_second_run_trains_nothing(
    config: MixConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    main(config)
    first, second = read_json(config.output / "ranking.json")
    assert (first["name"], second["name"]) == ("mostly up", "mostly down")
    assert first["score"] == first["bits_per_byte"]["rising"] < second["score"] - 0.3
    assert second["bits_per_byte"]["falling"] < first["bits_per_byte"]["falling"] - 0.3
    assert first["proportions"] == {"up": 0.9, "down": 0.1}
    assert first["epochs"]["up"] == pytest.approx(225 / (150 * 41 // 32))
    assert first["spread"] is None
    page = (config.output / "ranking.html").read_text()
    assert page.index("mostly up") < page.index("mostly down")
    assert "<svg" in page

    trained = []
    monkeypatch.setattr("puna.curate.mix.fit", lambda *arguments: trained.append(arguments))
    main(config)
    assert not trained
    assert read_json(config.output / "ranking.json") == [first, second]


def test_another_configuration_trains_again(config: MixConfig) -> None:
    config = replace(config, train=replace(config.train, steps=4), candidates=config.candidates[:1])
    main(config)
    before = read_json(config.output / "ranking.json")
    main(replace(config, train=replace(config.train, steps=5)))
    assert read_json(config.output / "ranking.json") != before


def test_interrupted_training_goes_on(config: MixConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    from puna.train import loop

    config = replace(config, train=replace(config.train, steps=6, checkpoint_every=1))
    main(config)
    expected = read_json(config.output / "ranking.json")
    original, steps = loop.train_step, []

    def interrupted(*arguments):  # type: ignore[no-untyped-def]
        steps.append(arguments[0].step)
        if len(steps) == 9:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(loop, "train_step", interrupted)
    again = replace(config, output=config.output.with_name("again"))
    with pytest.raises(KeyboardInterrupt):
        main(again)
    main(again)
    assert steps == [0, 1, 2, 3, 4, 5, 0, 1, 2, 2, 3, 4, 5]
    assert read_json(again.output / "ranking.json") == expected


def test_seeds_give_a_spread() -> None:
    def trial(rising: float, falling: float) -> Trial:
        return Trial({"rising": rising, "falling": falling}, {}, 0.0, 0.0)

    mixtures = {name: MixtureConfig((MixtureSource("up", Path("up"), 2.0),)) for name in ("a", "b")}
    trials = {"a": [trial(2, 1), trial(3, 1)], "b": [trial(1, 2), trial(1, 2)]}
    ranking = rank(trials, mixtures, {"rising": 3, "falling": 1})
    assert [row.name for row in ranking] == ["b", "a"]
    assert ranking[1].score == pytest.approx((1.75 + 2.5) / 2)
    assert ranking[1].spread == pytest.approx(0.75 / 2**0.5)
    assert ranking[0].spread == 0
    assert ranking[0].proportions == {"up": 1.0}


def test_no_proportions_mean_the_sizes_of_the_sources(config: MixConfig) -> None:
    tokenizer = load_tokenizer(config.tokenizer)
    natural = _mixture(Candidate("natural"), config, tokenizer)
    assert [source.proportion for source in natural.sources] == pytest.approx([0.75, 0.25])
    flat = _mixture(Candidate("flat", temperature=2), config, tokenizer)
    assert flat.sources[0].proportion == pytest.approx(3**0.5 / (1 + 3**0.5))


def test_mistakes_are_explained_before_anything_is_trained(config: MixConfig) -> None:
    with pytest.raises(ValueError, match="mixes sideways, but the sources are down, up"):
        replace(config, candidates=(Candidate("x", {"sideways": 1}),))
    with pytest.raises(ValueError, match="candidates is empty"):
        replace(config, candidates=())
    with pytest.raises(ValueError, match="Two of held_out have the same name"):
        replace(config, held_out=config.held_out[:1] * 2)
    with pytest.raises(ValueError, match="weight above 0"):
        replace(config, held_out=config.held_out[1:])
    with pytest.raises(InputError, match="Candidate mostly down: This training would go over down"):
        main(replace(config, max_epochs=2))
    with pytest.raises(InputError, match="vocab_size is 100"):
        main(replace(config, model=replace(config.model, vocab_size=100)))
    assert not config.output.exists()
