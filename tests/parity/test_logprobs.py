"""The parity gate: every way to a token's log-probability gives the same number.

The same model, the same text: the training loss on packed rows, offline evaluation in windows, the engine's report
while generating (alone and beside others), and `transformers` on the exported directory.
"""

import math
from pathlib import Path

import pytest
import torch

from puna.batches.chat import write_chat_shards
from puna.batches.conversations import Conversation
from puna.batches.packing import PackedRows
from puna.batches.shards import TokenShards
from puna.evaluate.likelihood import total_nats
from puna.infer.config import EngineConfig
from puna.infer.engine import Engine
from puna.infer.sampling import SamplingParams
from puna.model.config import LlamaConfig, RopeScaling
from puna.model.initialize import initialize
from puna.model.transformer import Transformer
from puna.tokenizer.base import Tokenizer
from puna.tokenizer.chat import render_chat
from puna.tokenizer.train import train_byte_level_bpe
from puna.train.loss import causal_lm_loss
from puna.weights.load import load_model, save_model

# float32 rounding through a few layers of sums of 64 terms; in bfloat16 it would be about 1e-2.
TOLERANCE = 2e-5


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    text = "The llama walks up the mountain and looks at the herd. Pregunta: ¿cuántas llamas? 一只羊驼。\n" * 40
    return train_byte_level_bpe([text], 300, tmp_path / "tokenizer")


@pytest.fixture
def model(tokenizer: Tokenizer) -> Transformer:
    model = Transformer(
        LlamaConfig(
            vocab_size=320,
            dim=32,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=8,
            hidden_dim=64,
            context_length=256,
            rope_scaling=RopeScaling("llama3", 8.0, original_context_length=64),
        )
    )
    initialize(model, 1)
    return model.eval()


CONVERSATIONS = [
    {
        "messages": [
            {"role": "user", "content": f"Where does llama number {n} walk <|eot_id|>?"},
            {"role": "assistant", "content": "Up the mountain, 一只羊驼, " * (1 + n % 3) + "slowly."},
            {"role": "user", "content": "And then?"},
            {"role": "assistant", "content": f"It looks at the herd {n} times."},
        ]
    }
    for n in range(6)
]


def test_training_evaluation_and_export_agree(model: Transformer, tokenizer: Tokenizer, tmp_path: Path) -> None:
    rendered = [render_chat(tokenizer, conversation["messages"]) for conversation in CONVERSATIONS]
    num_targets = sum(sum(chat.mask) for chat in rendered)

    conversations = [Conversation("made up", conversation["messages"]) for conversation in CONVERSATIONS]
    write_chat_shards(conversations, tokenizer, tmp_path / "shards", row_length=256)
    rows = PackedRows(TokenShards(tmp_path / "shards"), 256, 0, "whole")
    with torch.no_grad():
        packed = causal_lm_loss(model, rows.batch(range(rows.rows_per_epoch)))
    assert packed.count == num_targets

    evaluated, count = total_nats(model, [(chat.ids, chat.mask) for chat in rendered], window=256)
    assert count == num_targets

    save_model(model, tmp_path / "model", tokenizer=tokenizer)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    their_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    exported = 0.0
    for conversation, chat in zip(CONVERSATIONS, rendered, strict=True):
        harmless = [m | {"content": m["content"].replace("<|eot_id|>", "")} for m in conversation["messages"]]
        assert their_tokenizer.apply_chat_template(harmless, tokenize=False) == render_chat(tokenizer, harmless).text
        with torch.no_grad():
            logits = theirs(torch.tensor([chat.ids])).logits[0]
        logprobs = torch.log_softmax(logits.float(), -1)
        exported -= sum(logprobs[t - 1, chat.ids[t]].item() for t in range(1, len(chat.ids)) if chat.mask[t])

    assert evaluated / num_targets == pytest.approx(packed.total.item() / num_targets, abs=TOLERANCE)
    assert exported / num_targets == pytest.approx(packed.total.item() / num_targets, abs=TOLERANCE)


def test_serving_reports_what_training_computes(model: Transformer, tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_model(model, tmp_path / "model", tokenizer=tokenizer)
    engine = Engine(load_model(tmp_path / "model"), tokenizer, EngineConfig(max_rows=3, max_context=256))
    prompts = [render_chat(tokenizer, c["messages"][:-1], add_generation_prompt=True).ids for c in CONVERSATIONS]
    params = SamplingParams(max_tokens=20, temperature=0.8, seed=3, logprobs=0, ignore_eos=True)
    together = engine.generate(prompts, params)
    for prompt, completion in zip(prompts, together, strict=True):
        [alone] = engine.generate([prompt], params)
        assert alone.ids == completion.ids
        ids = [*prompt, *completion.ids]
        with torch.no_grad():
            expected = torch.log_softmax(model(torch.tensor([ids]))[0].float(), -1)
        for entry, t in zip(completion.logprobs, range(len(prompt), len(ids)), strict=False):
            assert entry.logprob == pytest.approx(expected[t - 1, ids[t]].item(), abs=TOLERANCE)


def test_what_serving_feeds_is_a_prefix_of_what_training_saw(tokenizer: Tokenizer) -> None:
    for conversation in CONVERSATIONS:
        whole = render_chat(tokenizer, conversation["messages"])
        for turn in (1, 3):
            prompt = render_chat(tokenizer, conversation["messages"][:turn], add_generation_prompt=True).ids
            assert whole.ids[: len(prompt)] == prompt
            assert whole.mask[len(prompt)] == 1
            assert not whole.mask[len(prompt) - 1]


def test_a_fresh_model_is_no_better_than_its_initial_spread(model: Transformer, tokenizer: Tokenizer) -> None:
    """A sanity check on the unit: about ln(vocabulary) nats, since the first weights know nothing."""
    ids = [tokenizer.bos_id or 0, *tokenizer.encode("The llama walks up the mountain." * 3)]
    nats, count = total_nats(model, [(ids, None)], window=256)
    assert math.log(320) * 0.8 < nats / count < math.log(320) * 1.4
