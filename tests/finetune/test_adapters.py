"""Every method trains by a recipe, and what is written computes what was trained."""

from pathlib import Path
from typing import Any

import pytest
import torch

from puna.config import load_config
from puna.finetune.answers import answer, greedy_without_cache
from puna.finetune.config import FinetuneConfig
from puna.finetune.main import main as finetune
from puna.finetune.tasks.head import predict
from puna.finetune.tasks.task import Example
from puna.infer.engine import Engine
from puna.infer.sampling import SamplingParams
from puna.peft.apply import attach
from puna.peft.files import load_adapter
from puna.peft.heads import HeadModel, load_head_model
from puna.peft.prefix import PrefixConfig
from puna.runtime.errors import InputError
from puna.runtime.files import read_json, read_jsonl, write_jsonl
from puna.runtime.manifest import Manifest
from puna.tokenizer.load import load_tokenizer
from puna.train.metrics import read_metrics
from puna.weights.load import load_model

TRAIN = [
    "train.steps=6",
    "train.batch_rows=4",
    "train.micro_batch_rows=2",
    "train.row_length=64",
    "train.log_every=2",
    "train.device=cpu",
    "train.num_threads=1",
    "train.tensorboard=false",
    "train.optimizer.learning_rate=1e-2",
    "train.schedule.warmup_steps=1",
]
METHODS = {
    "lora": ['peft={kind="lora",rank=4,b_rate=4}'],
    "dora": ['peft={kind="lora",rank=4,weight_decomposed=true,rank_stabilized=true}'],
    "qlora": ['peft={kind="lora",rank=4,four_bits={}}'],
    "adalora": ['peft={kind="adalora",initial_rank=4,target_rank=2,full_steps=1,final_steps=1}'],
    "ia3": ['peft={kind="ia3"}'],
    "bitfit": ['peft={kind="bitfit"}'],
    "bitfit everywhere": ['peft={kind="bitfit",targets=["layers.*"]}'],
    "bottleneck": ['peft={kind="bottleneck",size=4}'],
    "prefix": ['peft={kind="prefix",num_virtual_tokens=3}'],
    "prompt": ['peft={kind="prompt",num_virtual_tokens=3}'],
    "partial": ['peft={kind="partial",whole=["*norm"],top_layers=1}'],
}
UNMERGEABLE = {"bitfit everywhere", "bottleneck", "prefix", "prompt"}
SENTENCES = [("the good llama sleeps", "good"), ("a bad herd eats", "bad"), ("good hay", "good"), ("bad city", "bad")]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    write_jsonl(path, ({"text": text, "label": label} for text, label in SENTENCES))
    return path


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    write_jsonl(path, ({"prompt": f"Where {n}?", "completion": f"In Peru {n}."} for n in range(8)))
    return path


def tune(base_model: Path, output: Path, *settings: str) -> Path:
    finetune(load_config(FinetuneConfig, None, [f"model={base_model}", f"output={output}", *TRAIN, *settings]))
    return output


def class_logits(found: HeadModel) -> torch.Tensor:
    tokenizer = found.tokenizer
    assert tokenizer.bos_id is not None
    ids = [[tokenizer.bos_id, *tokenizer.encode(text)] for text, _ in SENTENCES]
    examples = [Example(each, [0] * len(each)) for each in ids]
    logits = predict(found.model, examples, found.spec.module, found.attention, tokenizer.pad_id)
    return torch.stack([each[-1] for each in logits])


@pytest.mark.parametrize("method", METHODS)
def test_a_head_over_every_method_is_read_back(base_model: Path, texts: Path, tmp_path: Path, method: str) -> None:
    task = ["task.kind=classification", f"data.train={texts}", f"data.held_out={texts}"]
    output = tune(base_model, tmp_path, *task, *METHODS[method])
    written = output / ("adapter" if method in UNMERGEABLE else "model")
    assert not (output / ("model" if method in UNMERGEABLE else "adapter")).exists()
    found = load_head_model(written)
    assert found.spec.labels == ("bad", "good")
    logits_NC = class_logits(found)
    wanted_N = torch.tensor([int(label == "good") for _, label in SENTENCES])
    loss = torch.nn.functional.cross_entropy(logits_NC, wanted_N)
    measured = read_metrics(output / "metrics.jsonl")[-1]["validation/loss"]
    # A merged weight is the rounded sum of two.
    assert loss.item() == pytest.approx(measured, rel=1e-4)
    accuracy = (logits_NC.argmax(-1) == wanted_N).float().mean().item()
    assert Manifest.read(written).results["validation/accuracy"] == accuracy


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
def test_peft_reads_a_head_with_virtual_tokens(base_model: Path, texts: Path, tmp_path: Path) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    output = tune(base_model, tmp_path, "task.kind=classification", f"data.train={texts}", *METHODS["prefix"])
    base = transformers.LlamaForSequenceClassification.from_pretrained(base_model, num_labels=2)
    theirs = peft.PeftModel.from_pretrained(base, output / "adapter").eval()
    found = load_head_model(output / "adapter")
    tokenizer = found.tokenizer
    ids = [tokenizer.bos_id, *tokenizer.encode(SENTENCES[0][0])]
    with torch.no_grad():
        expected = theirs(
            input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long)
        ).logits
    torch.testing.assert_close(class_logits(found)[:1], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["lora", "adalora", "prompt"])
def test_an_interrupted_tuning_ends_in_the_same_bits(
    base_model: Path, chats: Path, tmp_path: Path, method: str
) -> None:
    """Dropout, learning rates by parameter and the budget of ranks go on where they were."""
    settings = [
        f"conversations={chats}",
        METHODS[method][0].replace("}", ",dropout=0.3}" if method != "prompt" else "}"),
    ]
    whole = tune(base_model, tmp_path / "whole", *settings)
    every = "train.checkpoint_every=3"
    parts = tune(base_model, tmp_path / "parts", *settings, every)
    (parts / "checkpoints" / "step-00000006").rename(tmp_path / "away")  # as if killed after step 3
    (parts / "adapter" / "adapter_model.safetensors").unlink()
    tune(base_model, parts, *settings, every)
    names = [folder / "adapter" / "adapter_model.safetensors" for folder in (whole, parts)]
    assert names[0].read_bytes() == names[1].read_bytes()


def test_some_of_a_models_own_parameters_give_a_model(base_model: Path, chats: Path, tmp_path: Path) -> None:
    output = tune(base_model, tmp_path, f"conversations={chats}", *METHODS["partial"])
    before, after = load_model(base_model), load_model(output / "model")
    changed = {name for name, value in after.named_parameters() if not torch.equal(value, before.get_parameter(name))}
    expected = {name for name, _ in after.named_parameters() if name.startswith("layers.1.") or "norm" in name}
    assert changed == expected


def test_samples_with_a_prefix(base_model: Path, chats: Path, tmp_path: Path) -> None:
    """A model that the engine has no cache for answers all the same while it is trained."""
    samples = [f"held_out_conversations={chats}", 'sample_prompts=["Where 3?"]', "sample_tokens=5"]
    output = tune(base_model, tmp_path, f"conversations={chats}", *METHODS["prefix"], *samples)
    [sample] = read_jsonl(output / "samples" / "step-00000006.jsonl")
    model = load_model(base_model)
    load_adapter(model, output / "adapter")
    assert read_json(output / "adapter" / "adapter_config.json")["peft_type"] == "PREFIX_TUNING"
    assert isinstance(sample["answer"], str)
    with pytest.raises(InputError, match="no place for their virtual tokens"):
        Engine(model, load_tokenizer(base_model)).generate([[1, 2]], SamplingParams(max_tokens=2))


def test_greedy_without_a_cache_is_the_engines(base_model: Path) -> None:
    model, tokenizer = load_model(base_model), load_tokenizer(base_model)
    prompts = [[5, 6, 7], [8], list(range(20, 50))]
    expected = Engine(model, tokenizer).generate(prompts, SamplingParams(temperature=0, max_tokens=12))
    found = greedy_without_cache(model, prompts, 12, 128, tokenizer.stop_ids)
    assert [tuple(ids) for ids in found] == [completion.ids for completion in expected]
    short = greedy_without_cache(model, prompts, 12, 33, tokenizer.stop_ids)
    assert [len(ids) for ids in short][-1] == 3
    first = found[0][1]
    stopped = greedy_without_cache(model, prompts[:1], 12, 128, {first})
    assert stopped[0] == found[0][: found[0].index(first) + 1]
    attach(model, PrefixConfig(num_virtual_tokens=2))
    [prefixed] = answer(model, tokenizer, prompts[:1], 12, 128)
    assert prefixed.text == tokenizer.decode(greedy_without_cache(model, prompts[:1], 12, 128, tokenizer.stop_ids)[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (['peft={kind="lora",rank=2,targets=["layers.*.mlp"]}'], "fits no linear map"),
        (['peft={kind="adalora",full_steps=4,final_steps=3}'], "leave none of the 6 steps"),
        (['peft={kind="lara"}'], "lora"),
        (["peft.rank=2"], "kind"),
    ],
)
def test_a_wrong_method_is_explained(
    base_model: Path, chats: Path, tmp_path: Path, settings: list[Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        tune(base_model, tmp_path / "out", f"conversations={chats}", *settings)
    assert not (tmp_path / "out" / "checkpoints").exists()
