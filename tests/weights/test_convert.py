"""`puna convert` from end to end."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from puna.config import load_config, render_defaults
from puna.runtime.errors import InputError
from puna.runtime.manifest import Manifest, content_hash
from puna.tokenizer.convert import read_llama2c_tokenizer
from puna.tokenizer.load import load_tokenizer
from puna.weights import convert
from puna.weights.convert import ConvertConfig, main
from puna.weights.load import load_model, save_model


@pytest.fixture
def source(tmp_path, tiny, make_model):
    path = tmp_path / "source"
    save_model(make_model(replace(tiny, num_kv_heads=4), torch.bfloat16), path)
    return path


def run(source, destination, **options):
    main(ConvertConfig(source=str(source), destination=destination, **options))


def test_there_and_back_through_meta(source, tmp_path, assert_same_model):
    run(source, tmp_path / "meta", to="meta", shards=2)
    assert len(list((tmp_path / "meta").glob("consolidated.*.pth"))) == 2
    run(tmp_path / "meta", tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert_same_model(load_model(tmp_path / "back"), load_model(source))
    manifest = Manifest.read(tmp_path / "back")
    assert (manifest.stage, manifest.config["to"]) == ("convert", "hf")
    assert manifest.inputs == {str(tmp_path / "meta"): content_hash(tmp_path / "meta")}
    assert manifest.results == {"max_logit_difference": 0.0}


def test_rounding_is_measured_and_widening_is_exact(source, tmp_path):
    run(source, tmp_path / "wide", dtype="float32")
    run(tmp_path / "wide", tmp_path / "narrow", dtype="float16")
    assert load_file(tmp_path / "narrow" / "model.safetensors")["model.norm.weight"].dtype == torch.float16
    assert Manifest.read(tmp_path / "wide").results["max_logit_difference"] == 0.0
    save_model(load_model(source, dtype=torch.float32), tmp_path / "fine")
    model = load_model(tmp_path / "fine")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.001)
    save_model(model, tmp_path / "fine")
    run(tmp_path / "fine", tmp_path / "rounded", dtype="bfloat16")
    assert 0 < Manifest.read(tmp_path / "rounded").results["max_logit_difference"] < 0.1


def test_weights_beyond_float16_are_not_silently_infinite(tmp_path, make_model):
    model = make_model()
    with torch.no_grad():
        model.output.weight[3, 3] = 1e6
    save_model(model, tmp_path / "source")
    with pytest.raises(RuntimeError, match=r"went wrong: its logits .* differ by (inf|nan)"):
        run(tmp_path / "source", tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


def test_a_mismatch_keeps_nothing(source, tmp_path, monkeypatch):
    def save_wrongly(model, directory, **options):
        with torch.no_grad():
            model.norm.weight[0] += 1
        save_model(model, directory, **options)

    monkeypatch.setattr(convert, "save_model", save_wrongly)
    with pytest.raises(RuntimeError, match=r"went wrong: its logits .* Nothing was kept"):
        run(source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
    run(source, tmp_path / "out", verify=False)
    assert Manifest.read(tmp_path / "out").results == {}


def test_only_an_earlier_conversion_is_replaced(source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    run(source, out)  # an empty folder
    run(source, out, to="meta")  # an earlier conversion
    assert not (out / "config.json").exists()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("precious")
    for precious in (tmp_path / "notes", tmp_path / "notes" / "mine.txt"):
        with pytest.raises(InputError, match="exists and is not an earlier conversion"):
            run(source, precious)
    assert (tmp_path / "notes" / "mine.txt").read_text() == "precious"
    Manifest(stage="pretrain", config={}, inputs={}).write(tmp_path / "notes")
    with pytest.raises(InputError, match="exists and is not an earlier conversion"):
        run(source, tmp_path / "notes")


@pytest.mark.parametrize("where", [".", "..", "../source"])
def test_the_source_is_not_overwritten(where, source):
    with pytest.raises(InputError, match="holds the source"):
        run(source, source / where)
    load_model(source)


def test_an_absent_tokenizer(source, tmp_path):
    for name in ("tok.bin", "tokenizer.json"):
        with pytest.raises(InputError, match=f"There is no tokenizer at .*{name}"):
            run(source, tmp_path / "out", tokenizer=tmp_path / name)


def test_shards_are_for_meta_only(source, tmp_path):
    with pytest.raises(InputError, match='shards is for to = "meta"'):
        run(source, tmp_path / "out", shards=2)
    with pytest.raises(InputError, match="shards is 7, which does not divide num_kv_heads"):
        run(source, tmp_path / "out", to="meta", shards=7)
    assert not (tmp_path / "out").exists()


def test_stories_with_their_tokenizer(real_data, tmp_path):
    stories = real_data / "weights" / "stories260K"
    run(stories / "stories260K.bin", tmp_path / "hf", tokenizer=stories / "tok512.bin")
    assert load_tokenizer(tmp_path / "hf").hash == read_llama2c_tokenizer(stories / "tok512.bin").hash
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text())["eos_token_id"] == [2]
    run(tmp_path / "hf", tmp_path / "meta", to="meta")
    run(tmp_path / "meta", tmp_path / "back")
    for name in (
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
    ):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes(), name


def test_a_sentencepiece_tokenizer_stays_itself(real_data, tmp_path, tiny, make_model):
    original = real_data / "tokenizers" / "llama2" / "tokenizer.model"
    source = tmp_path / "source"
    save_model(make_model(replace(tiny, vocab_size=32_000)), source)
    shutil.copy(original, source)
    run(source, tmp_path / "meta", to="meta")
    run(tmp_path / "meta", tmp_path / "back")
    for folder in ("meta", "back"):
        assert (tmp_path / folder / "tokenizer.model").read_bytes() == original.read_bytes()
    assert load_tokenizer(tmp_path / "back").hash == load_tokenizer(original).hash


def test_llama3_ranks_come_back_from_tokenizer_json(real_data, tmp_path, tiny, make_model):
    original = real_data / "tokenizers" / "llama3" / "tokenizer.model"
    config = replace(tiny, vocab_size=128_256, dim=8, num_heads=2, num_kv_heads=1, head_dim=4, num_layers=1)
    source = tmp_path / "source"
    save_model(make_model(config, torch.bfloat16), source, tokenizer=load_tokenizer(original))
    (source / "tokenizer.model").unlink()  # as on the hub, where only tokenizer.json is in the main folder
    run(source, tmp_path / "meta", to="meta", verify=False)
    assert (tmp_path / "meta" / "tokenizer.model").read_bytes() == original.read_bytes()


def test_every_option_is_documented_and_settable(tmp_path):
    text = render_defaults(ConvertConfig)
    assert 'to = "hf"' in text
    assert text.count("\n# ") >= 7
    recipe = tmp_path / "convert.toml"
    recipe.write_text('source = "hub:a/b"\ndestination = "out"\nto = "meta"\n')
    config = load_config(ConvertConfig, recipe, ["dtype=bfloat16"])
    assert config == ConvertConfig(source="hub:a/b", destination=Path("out"), to="meta", dtype="bfloat16")
