"""New tokens and a longer context for a trained model; averages of models; continued pretraining end to end."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from puna.batches.shards import ShardWriter
from puna.model.config import LlamaConfig, RopeScaling
from puna.model.initialize import initialize
from puna.model.transformer import Transformer
from puna.pretrain.average import AverageConfig
from puna.pretrain.average import main as average
from puna.pretrain.extend import ExtendConfig
from puna.pretrain.extend import main as extend
from puna.pretrain.main import PretrainConfig
from puna.pretrain.main import main as pretrain
from puna.runtime.errors import InputError
from puna.runtime.manifest import Manifest
from puna.tokenizer.extend import extend_tokenizer
from puna.tokenizer.load import load_tokenizer
from puna.train.metrics import read_metrics
from puna.weights.load import load_model, save_model


@pytest.fixture
def trained(config: PretrainConfig) -> Path:
    """A model directory with its tokenizer, as a training leaves it."""
    return make_trained(config, config.output, tied=False)


def make_trained(config: PretrainConfig, output: Path, *, tied: bool) -> Path:
    assert config.tokenizer is not None
    model = Transformer(replace(config.model, tie_embeddings=tied))
    initialize(model, 3)
    save_model(model, output, tokenizer=load_tokenizer(config.tokenizer))
    return output


@pytest.mark.parametrize("tied", [False, True])
def test_new_rows_are_means_of_old_pieces(config: PretrainConfig, tmp_path: Path, tied: bool) -> None:
    source = make_trained(config, tmp_path / "model", tied=tied)
    # 270 ids in 320 rows: the first fifty new tokens take rows that were there, the rest are added.
    words = tuple(f" word{n}" for n in range(60))
    extend(ExtendConfig(model=source, output=tmp_path / "out", tokens=words, special_tokens=("<|gua|>",)))
    before, after = load_model(source), load_model(tmp_path / "out")
    old, new = load_tokenizer(source), load_tokenizer(tmp_path / "out")
    assert (old.vocab_size, new.vocab_size, after.config.vocab_size) == (270, 331, 384)
    for name in ("embedding", "output"):
        rows, old_rows = after.get_submodule(name).weight, before.get_submodule(name).weight
        assert torch.equal(rows[:270], old_rows[:270])
        for i, text in enumerate((*words, "<|gua|>"), start=270):
            assert new.token_bytes(i) == text.encode()
            pieces = old.encode(text)
            assert len(pieces) > 1
            assert torch.equal(rows[i], old_rows[pieces].mean(0))
        assert torch.equal(rows[331], old_rows[:270].mean(0))
    assert new.encode("a word7 <|gua|>") == [*old.encode("a"), 277, *old.encode(" <|gua|>")]
    assert new.encode("<|gua|>", allowed_special="all") == [330]
    assert new.encode("llama 3 alpaca") == old.encode("llama 3 alpaca")
    assert (new.bos_id, new.eos_id, new.pad_id, new.stop_ids) == (old.bos_id, old.eos_id, old.pad_id, old.stop_ids)


def test_the_extended_tokenizer_and_model_load_in_transformers(trained: Path, tmp_path: Path) -> None:
    import transformers

    extend(
        ExtendConfig(model=trained, output=tmp_path / "out", tokens=(" guanaco",), context_length=4096, rope_theta=1e6)
    )
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "a guanaco and a llama"
    assert theirs.encode(text, add_special_tokens=False) == load_tokenizer(tmp_path / "out").encode(text)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.arange(60)[None]
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, load_model(tmp_path / "out")(ids), atol=1e-5)
    assert model.config.max_position_embeddings == 4096


def test_a_sentencepiece_vocabulary_can_be_extended(real_data: Path) -> None:
    """The hard case: it puts a blank before a text, which must not come in twice after a new token."""
    old = load_tokenizer(real_data / "tokenizers" / "llama2" / "tokenizer.model")
    new = extend_tokenizer(old, [" vicuñas"], ["<|mask|>"])
    text = "two vicuñas here"
    assert new.encode(text) == [*old.encode("two"), old.vocab_size, *old.encode(" here", continuation=True)]
    assert new.decode(new.encode(text)) == text
    assert new.special_tokens["<|mask|>"] == old.vocab_size + 1
    assert new.vocab_size == old.vocab_size + 2
    for other in ["", "a", "two  blanks ", "ñandú\n\tfn(x) -> 3.14", "日本語 🦙"]:
        assert new.encode(other) == old.encode(other)
        assert new.decode(new.encode(other)) == old.decode(old.encode(other))
    with_special_only = extend_tokenizer(old, special_tokens=["<|mask|>"])
    assert with_special_only.prefix == "always"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": ("a",)}, "'a' is in the vocabulary already"),
        ({"special_tokens": ("<|end_of_text|>",)}, "is in the vocabulary already"),
        ({"tokens": ("new", "new")}, "'new' is given twice"),
        ({"tokens": ("",)}, "'' is empty"),
        ({"context_length": 100}, r"context_length \(100\) is less than the model's \(1,024\)"),
        ({"rope_scaling": RopeScaling(kind="llama3", factor=4)}, "original_context_length is 8,192"),
    ],
)
def test_extension_mistakes_are_explained(
    trained: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        extend(ExtendConfig(model=trained, output=tmp_path / "extended", **change))  # type: ignore[arg-type]
    assert not (tmp_path / "extended").exists()


def test_the_average_of_checkpoints_is_the_mean_of_their_tensors(config: PretrainConfig, tmp_path: Path) -> None:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    config = replace(config, train=replace(config.train, keep_checkpoints=3))
    pretrain(config)
    average(AverageConfig(training=config.output, last=3, output=tmp_path / "mean"))
    stored = []
    for number, path in enumerate(sorted((config.output / "checkpoints").glob("step-*"))):
        dcp_to_torch_save(path, tmp_path / f"{number}.pt")
        stored.append(torch.load(tmp_path / f"{number}.pt", weights_only=False)["model"])
    assert len(stored) == 3
    for name, parameter in load_model(tmp_path / "mean").named_parameters():
        expected = torch.stack([weights[name] for weights in stored]).mean(0)
        assert torch.allclose(parameter, expected, rtol=1e-6, atol=1e-8), name  # float32 sums in another order
        assert not torch.equal(parameter, stored[-1][name])
    assert load_tokenizer(tmp_path / "mean").hash == load_tokenizer(config.output / "model").hash
    with pytest.raises(InputError, match=r"holds 3 checkpoints, and 4 are to be averaged.*keep_checkpoints = 4"):
        average(AverageConfig(training=config.output, last=4, output=tmp_path / "more"))


def test_the_average_of_models(config: PretrainConfig, trained: Path, tmp_path: Path) -> None:
    assert config.tokenizer is not None
    other = Transformer(config.model)
    initialize(other, 4)
    save_model(other, tmp_path / "other", tokenizer=load_tokenizer(config.tokenizer))
    average(AverageConfig(models=(trained, tmp_path / "other"), output=tmp_path / "mean"))
    weights = dict(load_model(trained).named_parameters())
    for name, parameter in load_model(tmp_path / "mean").named_parameters():
        assert torch.equal(parameter, (weights[name] + other.get_parameter(name)) / 2)
    assert len(Manifest.read(tmp_path / "mean").inputs) == 2

    small = Transformer(replace(config.model, hidden_dim=32))
    initialize(small, 0)
    save_model(small, tmp_path / "small", tokenizer=load_tokenizer(config.tokenizer))
    with pytest.raises(InputError, match="another architecture"):
        average(AverageConfig(models=(trained, tmp_path / "small"), output=tmp_path / "no"))
    with pytest.raises(ValueError, match="either training, or models"):
        AverageConfig(output=tmp_path / "no")


def test_continued_pretraining_from_a_published_model(trained: Path, config: PretrainConfig, tmp_path: Path) -> None:
    """A model that transformers wrote, extended, trained on with re-warm-up, and its checkpoints averaged."""
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(trained)
    theirs.save_pretrained(tmp_path / "published")
    load_tokenizer(trained).save(tmp_path / "published")
    scaling = RopeScaling(kind="linear", factor=2)
    extended = tmp_path / "extended"
    extend(
        ExtendConfig(
            model=tmp_path / "published",
            output=extended,
            tokens=(" vicugna",),
            context_length=2048,
            rope_scaling=scaling,
        )
    )
    tokenizer = load_tokenizer(extended)
    (tmp_path / "new").mkdir()
    with ShardWriter(tmp_path / "new", tokenizer.vocab_size) as writer:
        for number in range(40):
            ids = tokenizer.encode(f"the vicugna {number} grazes")
            assert 270 in ids
            writer.add(ids, str(number), 30)
    Manifest("tokenize", {}, {}, writer.results(tokenizer.hash)).write(tmp_path / "new")
    more = replace(
        config,
        tokens=tmp_path / "new",
        tokenizer=None,
        init_from=extended,
        model=LlamaConfig(),
        output=tmp_path / "more",
    )
    pretrain(more)
    rates = [row["train/learning_rate"] for row in read_metrics(more.output / "metrics.jsonl")]
    assert rates[0] == 0 < rates[2] < rates[1]  # warm-up of one step, then down
    values = json.loads((more.output / "model" / "config.json").read_text())
    assert values["max_position_embeddings"] == 2048
    assert values["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert str(extended) in Manifest.read(more.output / "model").inputs
    with pytest.raises(InputError, match="tokenizer is not the one in"):
        pretrain(replace(more, tokenizer=config.tokenizer))
    with pytest.raises(InputError, match=r"longer than the model's context_length \(2,048\)"):
        pretrain(replace(more, train=replace(more.train, row_length=4096)))
