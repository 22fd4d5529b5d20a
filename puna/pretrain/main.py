"""`puna pretrain`: a Llama from token shards."""

from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from puna.batches.mixture import MixedRows, MixtureConfig, open_mixture
from puna.batches.packing import PackedRows
from puna.batches.shards import TokenShards, shard_folders
from puna.config import to_plain
from puna.model.accounting import count_parameters
from puna.model.config import LlamaConfig
from puna.model.initialize import initialize
from puna.model.transformer import Transformer
from puna.runtime.errors import InputError
from puna.runtime.manifest import Manifest, content_hash
from puna.runtime.progress import say
from puna.tokenizer.base import Tokenizer
from puna.tokenizer.load import load_tokenizer
from puna.train.config import TrainConfig
from puna.train.loop import fit
from puna.train.loss import causal_lm_loss
from puna.weights.load import save_model


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Train a model from random weights on token shards."""

    tokens: Path | None = None
    """Folder of token shards to train on (`puna tokenize` makes them)."""
    mixture: MixtureConfig | None = None
    """Several folders in proportions of your choice, in place of `tokens`."""
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

    def __post_init__(self) -> None:
        if (self.tokens is None) == (self.mixture is None):
            raise ValueError("Set either tokens, one folder of token shards, or mixture, several of them.")


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
    rows = _rows(config, tokenizer)
    held_out = None
    if config.held_out_tokens is not None:
        shards = TokenShards(config.held_out_tokens, tokenizer.hash)
        held_out = PackedRows(shards, config.train.row_length, 0, "cut", tokenizer.pad_id)

    model = Transformer(config.model)
    initialize(model, config.train.seed)
    epochs = _epochs(rows, config.train.steps * config.train.batch_rows)
    say(
        f"{count_parameters(config.model):,} parameters; "
        f"{config.train.steps * config.train.batch_rows * config.train.row_length:,} tokens to train on: "
        + ", ".join(f"{passes:.2f} passes over {name}" for name, passes in epochs.items())
    )
    inputs = {str(path): content_hash(path) for path in (*_folders(config), config.tokenizer)}
    run = to_plain(config) | {"inputs": inputs}
    result = fit(model, rows, causal_lm_loss, config.train, config.output, run, held_out)

    model.compute_dtype = None
    manifest = Manifest("pretrain", to_plain(config), inputs, asdict(result) | {"epochs": epochs})
    save_model(model, config.output / "model", tokenizer=tokenizer, dtype=torch.float32, manifest=manifest)
    say(f"Wrote {config.output / 'model'}")


def _folders(config: PretrainConfig) -> list[Path]:
    """Every folder of token shards that is trained on."""
    if config.mixture is None:
        return [] if config.tokens is None else [config.tokens]
    return [folder for source in config.mixture.sources for folder in shard_folders(source.tokens).values()]


def _rows(config: PretrainConfig, tokenizer: Tokenizer) -> PackedRows | MixedRows:
    train = config.train
    if config.mixture is None:
        assert config.tokens is not None
        shards = TokenShards(config.tokens, tokenizer.hash)
        return PackedRows(shards, train.row_length, train.seed, "cut", tokenizer.pad_id)
    return open_mixture(
        config.mixture,
        tokenizer=tokenizer,
        row_length=train.row_length,
        seed=train.seed,
        steps=train.steps,
        batch_rows=train.batch_rows,
    )


def _epochs(rows: PackedRows | MixedRows, num_rows: int) -> dict[str, float]:
    """How often each source is gone over."""
    if isinstance(rows, MixedRows):
        return rows.epochs(num_rows)
    return {str(rows.shards.directory): num_rows / rows.rows_per_epoch}
