"""`puna pretrain`: a Llama from token shards."""

from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from puna.batches.packing import PackedRows
from puna.batches.shards import TokenShards
from puna.config import to_plain
from puna.model.accounting import count_parameters
from puna.model.config import LlamaConfig
from puna.model.initialize import initialize
from puna.model.transformer import Transformer
from puna.runtime.errors import InputError
from puna.runtime.manifest import Manifest, content_hash
from puna.runtime.progress import say
from puna.tokenizer.load import load_tokenizer
from puna.train.config import TrainConfig
from puna.train.loop import fit
from puna.train.loss import causal_lm_loss
from puna.weights.load import save_model


@dataclass(frozen=True)
class PretrainConfig:
    """Train a model from random weights on token shards."""

    tokens: Path
    """Folder of token shards to train on (`puna tokenize` makes them)."""
    tokenizer: Path
    """The tokenizer that made the shards; it becomes part of the model directory."""
    output: Path
    """Gets model/ (the finished model directory), checkpoints/, metrics.jsonl and tensorboard/."""
    held_out_tokens: Path | None = None
    """Folder of token shards to measure the loss on."""
    model: LlamaConfig = field(default_factory=LlamaConfig)
    """The architecture. `vocab_size` has to hold the tokenizer's vocabulary."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The training run."""


def main(config: PretrainConfig) -> None:
    """Train to the last step, going on from a checkpoint if there is one, and write the model directory."""
    tokenizer = load_tokenizer(config.tokenizer)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise InputError(
            f"The tokenizer in {config.tokenizer} has {tokenizer.vocab_size:,} ids, but model.vocab_size is only "
            f"{config.model.vocab_size:,}. Raise it, to a multiple of 64 for speed."
        )
    if config.train.row_length > config.model.context_length:
        raise InputError(
            f"train.row_length ({config.train.row_length:,}) is longer than model.context_length "
            f"({config.model.context_length:,})."
        )
    rows = PackedRows(
        TokenShards(config.tokens, tokenizer.hash), config.train.row_length, config.train.seed, "cut", tokenizer.pad_id
    )
    held_out = None
    if config.held_out_tokens is not None:
        shards = TokenShards(config.held_out_tokens, tokenizer.hash)
        held_out = PackedRows(shards, config.train.row_length, 0, "cut", tokenizer.pad_id)

    model = Transformer(config.model)
    initialize(model, config.train.seed)
    seen = config.train.steps * config.train.batch_rows * config.train.row_length
    say(
        f"{count_parameters(config.model):,} parameters; {seen:,} tokens to train on, "
        f"{seen / rows.shards.num_tokens:.2f} passes over {config.tokens}"
    )
    inputs = {str(path): content_hash(path) for path in (config.tokens, config.tokenizer)}
    run = to_plain(config) | {"inputs": inputs}
    result = fit(model, rows, causal_lm_loss, config.train, config.output, run, held_out)

    model.compute_dtype = None
    manifest = Manifest("pretrain", to_plain(config), inputs, asdict(result))
    save_model(model, config.output / "model", tokenizer=tokenizer, dtype=torch.float32, manifest=manifest)
    say(f"Wrote {config.output / 'model'}")
