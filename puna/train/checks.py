"""What every training on conversations checks before it begins."""

from pathlib import Path
from typing import Literal

from puna.model.transformer import Transformer
from puna.runtime.errors import InputError
from puna.tokenizer.base import Tokenizer
from puna.tokenizer.chat_template import builtin_template
from puna.tokenizer.load import load_tokenizer
from puna.train.config import TrainConfig


def open_chat_tokenizer(model: Path, chat_template: Literal["keep", "llama2", "llama3", "chatml"]) -> Tokenizer:
    """A model's tokenizer, with its own chat template or a built-in one.

    Raises:
        InputError: it has none of its own.
    """
    tokenizer = load_tokenizer(model)
    if chat_template != "keep":
        tokenizer.chat_template = builtin_template(chat_template)
    if tokenizer.chat_template is None:
        raise InputError(
            f"The model in {model} has no chat template, so conversations cannot be rendered. Choose one with "
            "--set chat_template=llama3 (or llama2, chatml)."
        )
    return tokenizer


def check_row_length(config: TrainConfig, model: Transformer) -> None:
    """Refuse rows that the model has no positions for.

    Raises:
        InputError: they are longer than its context.
    """
    if config.row_length > model.config.context_length:
        raise InputError(
            f"train.row_length ({config.row_length:,}) is longer than the model's context "
            f"({model.config.context_length:,})."
        )
