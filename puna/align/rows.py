"""What every training on preferences opens first."""

from pathlib import Path
from typing import Literal

from puna.batches.preference_rows import PreferenceRows, write_preference_shards
from puna.batches.preferences import read_preferences, with_mismatched
from puna.batches.shards import TokenShards
from puna.model.transformer import Transformer
from puna.runtime.errors import InputError
from puna.tokenizer.base import Tokenizer
from puna.tokenizer.chat_template import builtin_template
from puna.tokenizer.load import load_tokenizer


def open_tokenizer(model: Path, chat_template: Literal["keep", "llama2", "llama3", "chatml"]) -> Tokenizer:
    """A model's tokenizer, with a chat template.

    Raises:
        InputError: there is none.
    """
    tokenizer = load_tokenizer(model)
    if chat_template != "keep":
        tokenizer.chat_template = builtin_template(chat_template)
    if tokenizer.chat_template is None:
        raise InputError(f"The model in {model} has no chat template; choose one with --set chat_template=llama3.")
    return tokenizer


def check_row_length(row_length: int, model: Transformer) -> None:
    """Refuse rows that the model has no positions for.

    Raises:
        InputError: they are longer than its context.
    """
    if row_length > model.config.context_length:
        raise InputError(
            f"train.row_length ({row_length:,}) is longer than the model's context ({model.config.context_length:,})."
        )


def open_rows(
    path: Path,
    destination: Path,
    *,
    tokenizer: Tokenizer,
    row_length: int,
    seed: int,
    judged: bool,
    formatting: bool,
    leave_out: bool,
) -> PreferenceRows:
    """Read preferences, write their shards, and open rows of them; see `write_preference_shards` for the arguments.

    Raises:
        InputError: a row cannot be used, or none can.
    """
    preferences = read_preferences(path)
    write_preference_shards(
        with_mismatched(preferences) if judged else preferences,
        tokenizer,
        destination,
        row_length,
        judged=judged,
        formatting=formatting,
        leave_out=leave_out,
    )
    return PreferenceRows(TokenShards(destination, tokenizer.hash), row_length, seed, tokenizer.pad_id)
