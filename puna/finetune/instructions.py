"""Instruction tuning: conversations of any form, packed side by side, only the assistant's tokens as targets."""

from collections.abc import Iterable
from functools import partial

import torch

from puna.batches.chat import write_chat_shards
from puna.batches.conversations import Conversation, read_conversations
from puna.batches.mixture import Ingredient, MixedRows
from puna.batches.packing import PackedRows
from puna.batches.shards import TokenShards
from puna.config import to_plain
from puna.finetune.answers import answer
from puna.finetune.config import FinetuneConfig
from puna.finetune.learn import learn
from puna.finetune.regularize.agreement import token_divergence
from puna.finetune.regularize.safeguards import Safeguards
from puna.finetune.selection import LOSS, Judge, check_selection
from puna.model.transformer import Transformer
from puna.parallel.mesh import is_first_process, wait_for_all
from puna.peft.tuning import adapt, save_tuned
from puna.runtime.errors import InputError
from puna.runtime.files import write_jsonl
from puna.runtime.manifest import Manifest, content_hash
from puna.runtime.progress import say
from puna.tokenizer.base import Tokenizer
from puna.tokenizer.chat import render_chat
from puna.train.checks import check_row_length, open_chat_tokenizer
from puna.train.loss import causal_lm_loss
from puna.weights.load import load_model


def tune(config: FinetuneConfig, judge: Judge | None = None) -> None:
    """Render and check the conversations, train, and write the model or adapter directory."""
    tokenizer = open_chat_tokenizer(config.model, config.chat_template)
    check_selection(config.selection, config.held_out_conversations is not None, [LOSS, *config.earlier_metrics])
    if config.sample_prompts and config.held_out_conversations is None:
        raise InputError("sample_prompts are answered at validations: set held_out_conversations too.")
    model = load_model(config.model, dtype=torch.float32)
    check_row_length(config.train, model)
    packed, rows = _training_rows(config, tokenizer)
    held_out = None
    if config.held_out_conversations is not None:
        held_out = _pack(read_conversations(config.held_out_conversations), tokenizer, config, "held_out")
    _announce(packed, config)
    training = adapt(model, config.peft, config.train.steps, config.train.seed)
    safeguards = Safeguards(config, model, tokenizer, training)
    plain_loss = partial(causal_lm_loss, z_loss=config.train.z_loss)
    training_rows, loss = safeguards.around_tokens(rows, plain_loss, token_divergence)

    paths = [config.model, *([config.conversations] if config.conversations else [])]
    inputs = {str(path): content_hash(path) for path in (*paths, *(source.conversations for source in config.mixture))}
    inputs |= safeguards.inputs
    samples = partial(_write_samples, config, tokenizer) if config.sample_prompts else None
    facts = learn(
        model,
        training_rows,
        loss,
        config,
        safeguards,
        inputs,
        held_out=held_out,
        measure=samples,
        judge=judge,
    )
    manifest = Manifest("finetune", to_plain(config), inputs, facts | safeguards.results())
    if is_first_process():
        written = save_tuned(
            model,
            config.peft,
            config.output,
            base_model=config.model,
            tokenizer=tokenizer,
            dtype=config.dtype,
            manifest=manifest,
        )
        safeguards.save_fisher(rows, plain_loss, written)


def _training_rows(config: FinetuneConfig, tokenizer: Tokenizer) -> tuple[list[PackedRows], PackedRows | MixedRows]:
    """The rows of each source, and those of all."""
    if config.conversations is not None:
        alone = _pack(read_conversations(config.conversations, config.form), tokenizer, config, "train")
        return [alone], alone
    total = sum(source.weight for source in config.mixture)
    packed, ingredients = [], []
    for source in config.mixture:
        conversations = read_conversations(source.conversations, source.form)
        packed.append(_pack(conversations, tokenizer, config, f"train-{source.name}"))
        ingredients.append(Ingredient(source.name, packed[-1], source.weight / total, source.weight / total))
    return packed, MixedRows(ingredients, annealing_start=0)


def _pack(conversations: Iterable[Conversation], tokenizer: Tokenizer, config: FinetuneConfig, name: str) -> PackedRows:
    destination = config.output / "tokens" / name
    if is_first_process():
        write_chat_shards(conversations, tokenizer, destination, config.train.row_length)
    wait_for_all()
    shards = TokenShards(destination, tokenizer.hash)
    return PackedRows(shards, config.train.row_length, config.train.seed, "whole", tokenizer.pad_id)


def _announce(packed: list[PackedRows], config: FinetuneConfig) -> None:
    conversations = sum(len(rows.shards) for rows in packed)
    targets = sum(rows.shards.num_targets for rows in packed)
    tokens = sum(rows.shards.num_tokens for rows in packed)
    rows = sum(rows.rows_per_epoch for rows in packed)
    say(
        f"{conversations:,} conversations in {rows:,} rows, {targets:,} of {tokens:,} tokens supervised; "
        f"{config.train.steps * config.train.batch_rows / rows:.2f} passes"
    )


def _write_samples(config: FinetuneConfig, tokenizer: Tokenizer, model: Transformer, step: int) -> dict[str, float]:
    """Answer the sample prompts into a file of this step; draws no curve."""
    chats = [[{"role": "user", "content": prompt}] for prompt in config.sample_prompts]
    prompts = [render_chat(tokenizer, chat, add_generation_prompt=True).ids for chat in chats]
    answers = answer(model, tokenizer, prompts, config.sample_tokens, model.config.context_length)
    lines = [
        {"step": step, "prompt": prompt, "answer": each.text, "is_whole": each.is_whole}
        for prompt, each in zip(config.sample_prompts, answers, strict=True)
    ]
    write_jsonl(config.output / "samples" / f"step-{step:08}.jsonl", lines)
    return {}
