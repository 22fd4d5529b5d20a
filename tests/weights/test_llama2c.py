"""llama2.c's binary format, on published weights and made-up ones."""

import json
import struct
from dataclasses import replace

import pytest
import torch

from puna.runtime.errors import InputError
from puna.tokenizer.convert import read_llama2c_tokenizer
from puna.weights.load import load_model, read_config, save_model
from puna.weights.meta import interleave


@pytest.fixture
def stories(real_data):
    return real_data / "weights" / "stories260K"


def greedy(model, ids, stop):
    with torch.inference_mode():
        while len(ids) < stop:
            ids = [*ids, int(model(torch.tensor([ids]))[0, -1].argmax())]
    return ids


def test_stories260k_writes_its_published_story_here_and_in_transformers(stories, tmp_path):
    import transformers

    expected = json.loads((stories / "expected_greedy.json").read_text())
    model = load_model(stories / "stories260K.bin")
    published = expected["config"]
    config = model.config
    assert (config.dim, config.hidden_dim, config.num_layers) == (64, 172, published["n_layers"])
    assert (config.num_heads, config.num_kv_heads, config.vocab_size) == (8, 4, 512)
    assert (config.context_length, config.tie_embeddings) == (published["max_seq_len"], True)

    tokenizer = read_llama2c_tokenizer(stories / "tok512.bin")
    ids = greedy(model, [tokenizer.bos_id], expected["steps"] + 1)
    assert tokenizer.decode(ids[1:]) == expected["expected_text"]

    save_model(model, tmp_path / "stories", tokenizer=tokenizer)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "stories")
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "stories")
    prompt = torch.tensor([[theirs.config.bos_token_id]])
    generated = theirs.generate(prompt, max_new_tokens=expected["steps"], do_sample=False)[0].tolist()
    assert generated == ids
    assert their_tokenizer.decode(generated, skip_special_tokens=True).strip() == expected["expected_text"]


def write_llama2c(path, model):
    """An independent writer: the order of the arrays as llama2.c documents it."""
    c = model.config
    vocab = c.vocab_size if c.tie_embeddings else -c.vocab_size
    header = struct.pack("<7i", c.dim, c.hidden_dim, c.num_layers, c.num_heads, c.num_kv_heads, vocab, c.context_length)
    layers = model.layers
    arrays = [
        model.embedding.weight,
        *(layer.attention_norm.weight for layer in layers),
        *(interleave(layer.attention.query.weight, c.num_heads) for layer in layers),
        *(interleave(layer.attention.key.weight, c.num_kv_heads) for layer in layers),
        *(layer.attention.value.weight for layer in layers),
        *(layer.attention.output.weight for layer in layers),
        *(layer.feed_forward_norm.weight for layer in layers),
        *(layer.feed_forward.gate.weight for layer in layers),
        *(layer.feed_forward.down.weight for layer in layers),
        *(layer.feed_forward.up.weight for layer in layers),
        model.norm.weight,
        torch.full((2, c.context_length, c.head_dim // 2), torch.nan),
        *([] if c.tie_embeddings else [model.output.weight]),
    ]
    path.write_bytes(header + b"".join(array.detach().numpy().astype("<f4").tobytes() for array in arrays))


@pytest.mark.parametrize("tied", [True, False])
def test_every_array_is_found(tied, tmp_path, tiny, make_model, assert_same_model):
    model = make_model(replace(tiny, tie_embeddings=tied))
    write_llama2c(tmp_path / "model.bin", model)
    assert_same_model(load_model(tmp_path / "model.bin"), model)


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        (lambda content: content[:11], "is cut short: it has 11 bytes, less than the header"),
        (lambda content: content[:-4], "is cut short: it has .* bytes, and its header asks for"),
        (lambda content: content[: len(content) // 2], "is cut short"),
        (lambda content: content + b"1234", "is too long"),
        (
            lambda content: struct.pack("<i", 0x616B3432) + content[4:],
            "version 1 or 2. Puna reads the legacy version 0",
        ),
        (lambda content: struct.pack("<i", -3) + content[4:], "is not a .bin of llama2.c: dim is -3"),
        (lambda content: content[:12] + bytes(4) + content[16:], "is not a .bin of llama2.c: num_heads is 0"),
    ],
)
def test_broken_files(edit, complaint, tmp_path, make_model):
    path = tmp_path / "model.bin"
    write_llama2c(path, make_model())
    path.write_bytes(edit(path.read_bytes()))
    with pytest.raises(InputError, match=complaint) as caught:
        read_config(path)
    assert str(path) in str(caught.value)
