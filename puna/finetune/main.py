"""`puna finetune`: teach a pretrained model to answer."""

from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from puna.batches.chat import write_chat_shards
from puna.batches.packing import PackedRows
from puna.batches.shards import TokenShards
from puna.config import to_plain
from puna.parallel.mesh import is_first_process, joined_processes, wait_for_all
from puna.runtime.errors import InputError
from puna.runtime.files import read_jsonl
from puna.runtime.manifest import Manifest, content_hash
from puna.runtime.progress import say
from puna.tokenizer.base import Tokenizer
from puna.tokenizer.chat_template import builtin_template
from puna.tokenizer.load import load_tokenizer
from puna.train.config import TrainConfig
from puna.train.loop import fit
from puna.train.loss import causal_lm_loss
from puna.weights.load import load_model, save_model


@dataclass(frozen=True)
class FinetuneConfig:
    """Instruction tuning of all parameters; only the assistant's tokens carry loss."""

    model: Path
    """Model directory to start from."""
    conversations: Path
    """JSON Lines with "messages" on each line (roles system, user, assistant), or a folder of such files."""
    output: Path
    """Gets model/ (the finished model directory), tokens/, checkpoints/, metrics.jsonl and tensorboard/."""
    held_out_conversations: Path | None = None
    """Conversations to measure the loss on."""
    chat_template: Literal["keep", "llama2", "llama3", "chatml"] = "keep"
    """The model's own chat template, or a built-in one whose special tokens its tokenizer has."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights in the finished model directory."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The training run."""


def main(config: FinetuneConfig) -> None:
    """Render and check the conversations, train, and write the model directory."""
    with joined_processes(config.train.device):
        _finetune(config)


def _finetune(config: FinetuneConfig) -> None:
    tokenizer = load_tokenizer(config.model)
    if config.chat_template != "keep":
        tokenizer.chat_template = builtin_template(config.chat_template)
    if tokenizer.chat_template is None:
        raise InputError(
            f"The model in {config.model} has no chat template, so conversations cannot be rendered. Choose one with "
            "--set chat_template=llama3 (or llama2, chatml)."
        )
    model = load_model(config.model, dtype=torch.float32)
    if config.train.row_length > model.config.context_length:
        raise InputError(
            f"train.row_length ({config.train.row_length:,}) is longer than the model's context "
            f"({model.config.context_length:,})."
        )
    rows = _rows(config.conversations, tokenizer, config, "train")
    held_out = None
    if config.held_out_conversations is not None:
        held_out = _rows(config.held_out_conversations, tokenizer, config, "held_out")
    say(
        f"{len(rows.shards):,} conversations in {rows.rows_per_epoch:,} rows, {rows.shards.num_targets:,} of "
        f"{rows.shards.num_tokens:,} tokens supervised; "
        f"{config.train.steps * config.train.batch_rows / rows.rows_per_epoch:.2f} passes"
    )
    inputs = {str(path): content_hash(path) for path in (config.model, config.conversations)}
    run = to_plain(config) | {"inputs": inputs}
    loss = partial(causal_lm_loss, z_loss=config.train.z_loss)
    result = fit(model, rows, loss, config.train, config.output, run, held_out)

    model.compute_dtype = None
    manifest = Manifest("finetune", to_plain(config), inputs, asdict(result))
    dtype = getattr(torch, config.dtype)
    if is_first_process():
        save_model(model, config.output / "model", tokenizer=tokenizer, dtype=dtype, manifest=manifest)
    say(f"Wrote {config.output / 'model'}")


def _rows(conversations: Path, tokenizer: Tokenizer, config: FinetuneConfig, name: str) -> PackedRows:
    destination = config.output / "tokens" / name
    if is_first_process():
        write_chat_shards(read_jsonl(conversations), tokenizer, destination, config.train.row_length)
    wait_for_all()
    shards = TokenShards(destination, tokenizer.hash)
    return PackedRows(shards, config.train.row_length, config.train.seed, "whole", tokenizer.pad_id)
