"""GGUF models in and out, and files that are broken on purpose."""

import contextlib
import struct
import time
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from puna.model.config import RopeScaling
from puna.runtime.errors import InputError
from puna.runtime.gguf_file import BY_NAME, read_gguf, write_gguf
from puna.runtime.manifest import Manifest
from puna.tokenizer.convert import read_llama2c_tokenizer
from puna.tokenizer.load import load_tokenizer
from puna.tokenizer.train import train_byte_level_bpe
from puna.weights import convert
from puna.weights.convert import ConvertConfig, main
from puna.weights.gguf import encoding_of, save_gguf
from puna.weights.load import load_model, read_config, save_model
from puna.weights.names import to_gguf

gguf = pytest.importorskip("gguf")

LLAMA3 = RopeScaling("llama3", factor=8.0, original_context_length=32)
FLAGS = [
    {},
    {"tie_embeddings": True},
    {"qkv_bias": True},
    {"qk_norm": True, "head_dim": 16},
    {"rope_scaling": LLAMA3},
    {"rope_scaling": RopeScaling("linear", factor=2.0)},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_there_and_back_is_exact(tmp_path, tiny, make_model, assert_same_model, flags, dtype):
    model = make_model(replace(tiny, **flags), dtype)
    kind = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
    save_gguf(model, tmp_path / "model.gguf", type=kind)
    assert read_config(tmp_path) == read_config(tmp_path / "model.gguf") == model.config
    assert_same_model(load_model(tmp_path / "model.gguf"), model)
    assert_same_model(load_model(tmp_path), model)


@pytest.mark.parametrize("flags", [*FLAGS[:3], {"qk_norm": True, "head_dim": 128}], ids=str)
def test_transformers_reads_our_file(tmp_path, tiny, make_model, flags):
    """An independent reader: names, sizes, order of rows, bias and norms of queries and keys."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")  # which transformers wants for it
    tokenizer = train_byte_level_bpe(["the llama grazes on the high puna"] * 20, 280, tmp_path / "tokenizer")
    model = make_model(replace(tiny, **{"vocab_size": 304, "dim": 64, "head_dim": 16} | flags))
    save_gguf(model, tmp_path / "model.gguf", type="f32", tokenizer=tokenizer)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32
    ).eval()
    ids = torch.randint(280, (1, 20), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(theirs(ids).logits, model(ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_1", "BF16"])
def test_a_file_of_the_gguf_package(tmp_path, tiny, make_model, kind):
    """Written by another hand, in llama.cpp's order of rows: neighbours of a head stand together."""
    config = replace(tiny, dim=64, head_dim=16, hidden_dim=96, tie_embeddings=True, norm_eps=1e-6)
    model = make_model(config)
    writer = gguf.GGUFWriter(tmp_path / "their.gguf", "llama")
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.hidden_dim)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    quant = gguf.GGMLQuantizationType[kind]
    rounded = {}
    for name, parameter in model.named_parameters():
        values = parameter.detach().numpy()
        if values.ndim == 1:
            writer.add_tensor(to_gguf(name), values)
            rounded[name] = values
            continue
        blocks = gguf.quants.quantize(values, quant)
        rounded[name] = gguf.quants.dequantize(blocks, quant).reshape(values.shape)
        heads = {"query": config.num_heads, "key": config.num_kv_heads}.get(name.split(".")[-2])
        if heads:
            in_theirs = np.empty_like(blocks)
            for head, row in np.ndindex(heads, 16):
                target = 2 * row if row < 8 else 2 * (row - 8) + 1
                in_theirs[head * 16 + target] = blocks[head * 16 + row]
            blocks = in_theirs
        writer.add_tensor(to_gguf(name), blocks, raw_dtype=quant)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours = load_model(tmp_path / "their.gguf", dtype=torch.float32)
    assert ours.config == config
    for name, parameter in ours.named_parameters():
        assert np.array_equal(parameter.detach().numpy(), rounded[name]), name


def test_the_gguf_package_reads_our_file(tmp_path, tiny, make_model):
    model = make_model(replace(tiny, rope_scaling=LLAMA3))
    save_gguf(model, tmp_path / "model.gguf", type="bf16", name="tiny")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    assert reader.get_field("general.name").contents() == "tiny"
    assert reader.get_field("llama.attention.head_count_kv").contents() == 2
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert tensors["rope_freqs.weight"].data.shape == (6,)
    assert set(tensors) - {"rope_freqs.weight"} == {to_gguf(name) for name, _ in model.named_parameters()}
    values = gguf.quants.dequantize(tensors["output.weight"].data, gguf.GGMLQuantizationType.BF16)
    assert np.array_equal(values, model.output.weight.detach().bfloat16().float().numpy())


def test_encodings_of_a_four_bit_file():
    wide, narrow, odd = (8, 512), (8, 64), (8, 48)
    assert encoding_of("blk.0.attn_q.weight", wide, "q4_k").name == "Q4_K"
    assert encoding_of("blk.0.attn_q.weight", narrow, "q4_k").name == "Q4_0"
    assert encoding_of("blk.0.attn_q.weight", odd, "q4_k").name == "F16"
    assert encoding_of("output.weight", wide, "q4_0").name == "Q8_0"
    assert encoding_of("output.weight", wide, "q4_0", pure=True).name == "Q4_0"
    assert encoding_of("output.weight", wide, "f16").name == "F16"
    assert encoding_of("output_norm.weight", (512,), "q8_0").name == "F32"


@pytest.mark.parametrize(
    "scaling",
    [
        RopeScaling("llama3", 8.0),
        RopeScaling("llama3", 32.0),
        RopeScaling("llama3", 4.0, 1.0, 2.0, 4096),
        RopeScaling("llama3", 16.0, 2.0, 8.0, 4096),
        RopeScaling("llama3", 8.0, 1.0, 1.01, 8192),
    ],
)
def test_llama3_scaling_is_found_again(tmp_path, tiny, make_model, scaling):
    """From the factors alone; the same up to a common multiple of frequencies and length, which changes nothing."""
    from puna.model.rope import frequencies

    config = replace(tiny, head_dim=128, num_heads=1, num_kv_heads=1, rope_theta=500_000.0, rope_scaling=scaling)
    save_gguf(make_model(config), tmp_path / "model.gguf", type="f16")
    found = read_config(tmp_path)
    torch.testing.assert_close(frequencies(found), frequencies(config), rtol=1e-4, atol=0)
    if scaling.low_freq_factor == 1.0 and scaling.high_freq_factor != 1.01:
        assert found == config


def test_other_rope_factors_are_refused(tmp_path, tiny, make_model):
    save_gguf(make_model(replace(tiny, rope_scaling=LLAMA3)), tmp_path / "model.gguf", type="f16")
    file = read_gguf(tmp_path / "model.gguf")
    start = file.tensors["rope_freqs.weight"].start
    content = bytearray((tmp_path / "model.gguf").read_bytes())
    content[start : start + 24] = np.array([1, 3, 2, 5, 4, 8], "<f4").tobytes()
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(InputError, match=r"factors .* other than those of Llama 3\.1"):
        read_config(tmp_path)


def run(source, destination, **options):
    main(ConvertConfig(source=str(source), destination=destination, to="gguf", **options))


@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "q4_k", "f16"])
def test_convert_compares_what_was_written(tmp_path, tiny, make_model, kind):
    save_model(make_model(replace(tiny, dim=256, hidden_dim=512, tie_embeddings=True)), tmp_path / "source")
    run(tmp_path / "source", tmp_path / "out", type=kind)
    largest = convert.logits_of_random_tokens(load_model(tmp_path / "source")).abs().max().item()
    difference = Manifest.read(tmp_path / "out").results["max_logit_difference"]
    assert 0 < difference < {"f16": 0.005, "q8_0": 0.1}.get(kind, 0.8) * largest
    main(ConvertConfig(source=str(tmp_path / "out"), destination=tmp_path / "hf"))
    assert Manifest.read(tmp_path / "hf").results["max_logit_difference"] == 0


def test_convert_with_a_real_model_and_its_tokenizer(real_data, tmp_path):
    stories = real_data / "weights" / "stories260K"
    run(stories / "stories260K.bin", tmp_path / "out", tokenizer=stories / "tok512.bin", type="q8_0")
    assert load_tokenizer(tmp_path / "out").hash == read_llama2c_tokenizer(stories / "tok512.bin").hash
    main(ConvertConfig(source=str(tmp_path / "out" / "model.gguf"), destination=tmp_path / "hf"))
    assert load_tokenizer(tmp_path / "hf").hash == load_tokenizer(tmp_path / "out").hash


def test_a_wrong_order_of_rows_is_noticed(tmp_path, tiny, make_model, monkeypatch):
    save_model(make_model(), tmp_path / "source")

    def save_wrongly(model, path, **options):
        with torch.no_grad():
            model.layers[0].attention.key.weight.copy_(model.layers[0].attention.key.weight.roll(1, 0))
        save_gguf(model, path, **options)
        with torch.no_grad():
            model.layers[0].attention.key.weight.copy_(model.layers[0].attention.key.weight.roll(-1, 0))

    monkeypatch.setattr(convert, "save_gguf", save_wrongly)
    with pytest.raises(RuntimeError, match="went wrong"):
        run(tmp_path / "source", tmp_path / "out", type="q8_0")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "hf", "type": "q8_0"}, 'type and pure are for to = "gguf"'),
        ({"type": "q8_0", "dtype": "float16"}, "leave one of them out"),
        ({"type": "q8_0", "pure": True}, "pure is for the 4-bit types"),
        ({"shards": 2}, 'shards is for to = "meta"'),
    ],
)
def test_options_that_do_not_belong_together(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        main(ConvertConfig(**({"source": "x", "destination": tmp_path / "out", "to": "gguf"} | options)))


def test_the_destination_is_a_folder(tmp_path):
    with pytest.raises(InputError, match=r"does not end in \.gguf, such as .*out"):
        main(ConvertConfig(source="x", destination=tmp_path / "out.gguf", to="gguf"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"qkv_bias": True, "qk_norm": True}, "no GGUF form"),
        ({"qkv_bias": True, "rope_scaling": LLAMA3}, "runs a model with qkv_bias"),
    ],
)
def test_models_that_llama_cpp_does_not_have(tmp_path, tiny, make_model, flags, message):
    with pytest.raises(InputError, match=message):
        save_gguf(make_model(replace(tiny, **flags)), tmp_path / "model.gguf", type="f16")
    assert not (tmp_path / "model.gguf").exists()


@pytest.fixture(scope="module")
def sound(make_model, tmp_path_factory):
    """A small whole file with a tokenizer, as bytes, and where its header ends."""
    folder = tmp_path_factory.mktemp("sound")
    from puna.model.config import LlamaConfig

    config = LlamaConfig(
        vocab_size=300, dim=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16, hidden_dim=32, context_length=64
    )  # fmt: skip
    tokenizer = train_byte_level_bpe(["the llama grazes on the high puna"] * 20, 280, folder / "tokenizer")
    save_gguf(make_model(config), folder / "model.gguf", type="q8_0", tokenizer=tokenizer)
    file = read_gguf(folder / "model.gguf")
    return (folder / "model.gguf").read_bytes(), min(tensor.start for tensor in file.tensors.values())


def try_to_load(path):
    """Load whatever can be loaded; anything but success and InputError is a fault. Returns the peak memory in bytes."""
    tracemalloc.start()
    started = time.process_time()
    try:
        for load in (load_model, load_tokenizer):
            with contextlib.suppress(InputError):
                load(path)
        assert time.process_time() - started < 5
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_mutated_files_end_in_a_readable_error(sound, tmp_path, data):
    content, header_end = bytearray(sound[0]), sound[1]
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, header_end - 8))
        what = data.draw(st.sampled_from(["byte", "huge", "zero", "negative", "cut"]))
        if what == "byte":
            content[at] = data.draw(st.integers(0, 255))
        elif what == "huge":
            content[at : at + 8] = struct.pack("<Q", data.draw(st.sampled_from([2**31, 2**40, 2**63, 2**64 - 1])))
        elif what == "zero":
            content[at : at + 4] = bytes(4)
        elif what == "negative":
            content[at : at + 4] = b"\xff\xff\xff\xff"
        else:
            del content[data.draw(st.integers(0, len(content))) :]
            header_end = max(min(header_end, len(content)), 8)
            content.extend(bytes(8))
    (tmp_path / "model.gguf").write_bytes(content)
    assert try_to_load(tmp_path / "model.gguf") < 50e6


def test_every_cut_is_noticed(sound, tmp_path):
    content, header_end = sound
    path = tmp_path / "model.gguf"
    for length in [*range(0, 200), *range(200, header_end, 97), *range(header_end, len(content), 1009)]:
        path.write_bytes(content[:length])
        with pytest.raises(InputError, match=r"model\.gguf"):
            load_model(path)


def header(num_tensors, num_values, rest=b"", version=3):
    return b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_values) + rest


def text(value):
    return struct.pack("<Q", len(value)) + value.encode()


TENSOR = text("a") + struct.pack("<IQIQ", 1, 32, 0, 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it has 0 bytes"),
        (b"version https://git-lfs", "does not begin with GGUF"),
        (header(0, 0, version=1), "version 1, not 2 or 3"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (header(2**60, 0), "ends in the middle"),
        (header(0, 2**60), "ends in the middle"),
        (header(0, 1, struct.pack("<Q", 2**63)), "ends in the middle"),
        (header(0, 1, text("k") + struct.pack("<I", 77)), "unknown type"),
        (header(0, 1, text("k") + struct.pack("<IIQ", 9, 9, 2**62)), "lists of lists"),
        (header(0, 1, text("k") + struct.pack("<IIQ", 9, 8, 2**61)), "ends in the middle"),
        (header(0, 1, text("k") + struct.pack("<IIQ", 9, 4, 2**62)), "ends in the middle"),
        (header(0, 2, (text("k") + struct.pack("<II", 4, 1)) * 2), "twice"),
        (header(0, 1, struct.pack("<Q", 2) + b"\xff\xfe"), "not UTF-8"),
        (header(0, 1, text("general.alignment") + struct.pack("<II", 4, 3)), "not a power of two"),
        (header(2, 0, TENSOR * 2), "two tensors"),
        (header(1, 0, text("a") + struct.pack("<I", 9)), "9 dimensions"),
        (header(1, 0, text("a") + struct.pack("<IQIQ", 1, 32, 23, 0)), "type 23; Puna reads F32"),
        (header(1, 0, text("a") + struct.pack("<IQIQ", 1, 31, 8, 0)), "cannot hold"),
        (header(1, 0, text("a") + struct.pack("<IQIQ", 1, 0, 0, 0)), "cannot hold"),
        (header(1, 0, text("a") + struct.pack("<IQIQ", 1, 32, 0, 7)), "multiple of 32"),
        (header(1, 0, text("a") + struct.pack("<IQIQ", 1, 2**62, 0, 0)), "beyond the end"),
        (header(1, 0, text("a") + struct.pack("<IQIQ", 1, 32, 0, 2**63)), "beyond the end"),
        (header(1, 0, text("a") + struct.pack("<I4QIQ", 4, *[2**63] * 4, 0, 0)), "beyond the end"),
        (header(2, 0, TENSOR + TENSOR.replace(b"a", b"b") + bytes(256)), "overlap"),
    ],
)  # fmt: skip
def test_hostile_headers(tmp_path, content, message):
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_model(tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": "mamba"}, "architecture 'mamba'"),
        ({"general.architecture": 7}, "of type str"),
        ({"llama.block_count": 1_000_000_000}, "absent"),
        ({"llama.embedding_length": 1 << 31}, "asks for"),
        ({"llama.attention.head_count": 1 << 20}, "has to be a multiple"),
        ({"llama.attention.head_count": np.array([4, 4], np.int32)}, "a list of 2"),
        ({"llama.context_length": 1 << 40}, "context_length"),
        ({"llama.rope.freq_base": float("nan")}, "positive number"),
        ({"llama.rope.dimension_count": 6}, "several widths"),
        ({"llama.rope.scaling.type": "yarn"}, "'yarn'"),
        ({"llama.expert_count": 8}, "expert_count"),
        ({"split.count": 3}, "one part of a split model"),
        ({"llama.feed_forward_length": None}, "lacks llama.feed_forward_length"),
    ],
)
def test_metadata_that_does_not_fit(tmp_path, tiny, make_model, changes, message):
    save_gguf(make_model(), tmp_path / "model.gguf", type="f32")
    file = read_gguf(tmp_path / "model.gguf")
    metadata = {key: value for key, value in {**file.metadata, **changes}.items() if value is not None}
    tensors = [(name, tensor.shape, tensor.encoding) for name, tensor in file.tensors.items()]
    write_gguf(tmp_path / "changed.gguf", metadata, tensors, (file.blocks(name) for name in file.tensors))
    with pytest.raises(InputError, match=message):
        load_model(tmp_path / "changed.gguf")


def test_a_folder_of_several_files(tmp_path, make_model):
    for name in ("a.gguf", "b.gguf"):
        save_gguf(make_model(), tmp_path / name, type="f16")
    with pytest.raises(InputError, match="holds 2 GGUF files"):
        load_model(tmp_path)


def test_values_of_every_kind(tmp_path):
    values = {
        "a": True, "b": 7, "c": -7, "d": 1e-5, "e": "é", "f": ["x", ""], "g": np.array([1, 2], np.int32),
        "h": np.array([0.5], np.float32), "i": 2**40, "j": np.array([], np.uint8),
    }  # fmt: skip
    write_gguf(tmp_path / "x.gguf", values, [("t", (2, 3), BY_NAME["F32"])], [np.arange(24, dtype=np.uint8)])
    file = read_gguf(tmp_path / "x.gguf")
    for key, value in values.items():
        assert np.array_equal(file.metadata[key], value)
        assert type(file.metadata[key]) is type(value)
    assert file.tensors["t"].shape == (2, 3)
    assert np.array_equal(file.blocks("t").ravel(), np.arange(24))
    fields = gguf.GGUFReader(tmp_path / "x.gguf").fields
    assert fields["d"].contents() == pytest.approx(1e-5)
    assert fields["f"].contents() == ["x", ""]


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0", "q4_0", "q4_k"])
def test_llama_cpp_runs_our_file(real_data, tmp_path, kind):
    """The same greedy ids. Runs where llama-cpp-python is installed; it has to be compiled, so it is no dependency."""
    stories = real_data / "weights" / "stories260K"
    run(stories / "stories260K.bin", tmp_path / "out", tokenizer=stories / "tok512.bin", type=kind)
    check_greedy(tmp_path / "out" / "model.gguf")


@pytest.mark.parametrize("number", [2, 3, 7, 8, 9], ids=["q4_0", "q4_1", "q8_0", "q5_0", "q5_1"])
def test_we_run_llama_cpps_file(real_data, tmp_path, number):
    """Written by its own quantiser."""
    llama_cpp = pytest.importorskip("llama_cpp")
    stories = real_data / "weights" / "stories260K"
    run(stories / "stories260K.bin", tmp_path / "out", tokenizer=stories / "tok512.bin", type="f32")
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = number, 1
    source, target = tmp_path / "out" / "model.gguf", tmp_path / "theirs.gguf"
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), params) == 0
    check_greedy(target)


def check_greedy(path):
    """Both sides go on alike from the same ids."""
    llama_cpp = pytest.importorskip("llama_cpp")
    theirs = llama_cpp.Llama(str(path), n_ctx=256, n_threads=1, verbose=False, logits_all=False)
    tokenizer, model = load_tokenizer(path), load_model(path, dtype=torch.float32)
    prompt = "Once upon a time"
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    assert theirs.tokenize(prompt.encode(), add_bos=True) == ids
    stream = theirs.generate(ids, temp=0.0, repeat_penalty=1.0)
    expected = [next(stream) for _ in range(40)]
    found = list(ids)
    with torch.inference_mode():
        for _ in expected:
            found.append(int(model(torch.tensor([found]))[0, -1].argmax()))
    assert found[len(ids) :] == expected
