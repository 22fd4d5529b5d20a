"""Finding out what a path is, and writing a model directory whole or not at all."""

import json
import resource
from dataclasses import replace

import pytest
import torch

from puna.runtime.errors import InputError
from puna.runtime.manifest import Manifest
from puna.tokenizer.convert import read_llama2c_tokenizer
from puna.tokenizer.load import load_tokenizer
from puna.weights.load import load_model, read_config, save_model


def test_dtype_and_device(tmp_path, make_model):
    save_model(make_model(), tmp_path / "model", dtype=torch.bfloat16)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    model = load_model(tmp_path / "model")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    wide = load_model(str(tmp_path / "model"), dtype=torch.float32)
    assert {parameter.dtype for parameter in wide.parameters()} == {torch.float32}
    assert torch.equal(wide.norm.weight, model.norm.weight.float())


def test_the_model_is_not_in_memory_twice(tmp_path, tiny, make_model, monkeypatch):
    """Of the stored tensors at most one is alive while the next is read."""
    from puna.weights import load

    save_model(make_model(), tmp_path / "model")
    stored = load.hf_tensors(tmp_path / "model")
    alive = []

    def read(name):
        import weakref

        tensor = stored.read(name)
        assert sum(reference() is not None for reference in alive) <= 1
        alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(load, "hf_tensors", lambda path: replace(stored, read=read))
    load_model(tmp_path / "model")
    assert len(alive) == len(stored.shapes)


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda path: path.touch()], ids=["folder", "file"])
def test_a_path_that_is_no_checkpoint(make, tmp_path):
    path = tmp_path / "thing"
    make(path)
    with pytest.raises(InputError, match=r"thing is not a checkpoint that Puna reads: a Hugging Face directory"):
        load_model(path)


def test_an_absent_path(tmp_path):
    with pytest.raises(InputError, match=r"no checkpoint at .*nothing.*write hub:ORGANISATION/NAME"):
        read_config(tmp_path / "nothing")


def test_the_hub_is_asked_only_when_named(tmp_path, make_model, monkeypatch):
    import huggingface_hub

    save_model(make_model(), tmp_path / "model")
    asked = []

    def download(name, *, allow_patterns):
        asked.append(name)
        assert "*.json" in allow_patterns
        if name == "no/such":
            raise OSError("404")
        return str(tmp_path / "model")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    load_model(tmp_path / "model")
    assert asked == []
    assert read_config("hub:some/model").dim == 48
    assert asked == ["some/model"]
    with pytest.raises(InputError, match="hub:no/such could not be downloaded: 404"):
        load_model("hub:no/such")


def test_offline_hub_is_one_readable_paragraph():
    with pytest.raises(InputError, match="hub:puna-test/absent could not be downloaded"):
        load_model("hub:puna-test/absent")


@pytest.fixture
def tokenizer(real_data):
    return read_llama2c_tokenizer(real_data / "weights" / "stories260K" / "tok512.bin")


def test_a_complete_directory(tmp_path, tiny, make_model, tokenizer):
    import transformers

    tokenizer.stop_ids |= {7}
    manifest = Manifest(stage="pretrain", config={"steps": 3}, inputs={"corpus": "abc"})
    save_model(make_model(replace(tiny, vocab_size=520)), tmp_path / "model", tokenizer=tokenizer, manifest=manifest)
    assert Manifest.read(tmp_path / "model") == manifest
    assert load_tokenizer(tmp_path / "model").stop_ids == {2, 7}
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "model")
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, [2, 7], 2)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "model")
    # An end-of-document token that pads as well must not become transformers' untrained padding embedding.
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, None)
    text = "Once upon a time"
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert theirs.encode(text) == [1, *tokenizer.encode(text)]


def test_a_tokenizer_of_another_model(tmp_path, make_model, tokenizer):
    with pytest.raises(InputError, match="The tokenizer has 512 ids, but the model's embedding only 96 rows"):
        save_model(make_model(), tmp_path / "model", tokenizer=tokenizer)
    assert not list(tmp_path.iterdir())


def test_an_earlier_directory_is_replaced_whole(tmp_path, make_model, assert_same_model):
    save_model(make_model(seed=1), tmp_path / "model", max_shard_bytes=30_000)
    save_model(make_model(seed=2), tmp_path / "model")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]
    assert_same_model(load_model(tmp_path / "model"), make_model(seed=2))


def test_a_full_disk_leaves_what_was_there(tmp_path, make_model, assert_same_model):
    save_model(make_model(seed=1), tmp_path / "model")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # a real failing write, with EFBIG for ENOSPC
    try:
        for name in ("model", "new"):
            with pytest.raises(OSError, match=r"model\.safetensors could not be written"):
                save_model(make_model(seed=2), tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert_same_model(load_model(tmp_path / "model"), make_model(seed=1))


def test_an_embedding_left_in_its_file(tmp_path, make_model):
    model = make_model()
    save_model(model, tmp_path / "model")
    plain = load_model(tmp_path / "model")
    mapped = load_model(tmp_path / "model", map_embedding=True)
    assert mapped.state_dict().keys() == plain.state_dict().keys()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(mapped.state_dict()[name], tensor)
    (path,) = (tmp_path / "model").glob("*.safetensors")
    stored = path.read_bytes()
    with torch.no_grad():
        mapped.embedding.weight.zero_()
    assert not mapped.embedding.weight.any()
    assert path.read_bytes() == stored
