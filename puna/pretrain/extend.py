"""`puna extend`: give a trained model new tokens, a longer context, or both, before training goes on.

Shapes: V vocabulary, D model dimension.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from puna.config import to_plain
from puna.model.config import LlamaConfig, RopeScaling
from puna.model.transformer import Linear, Transformer
from puna.runtime.errors import InputError
from puna.runtime.manifest import Manifest, content_hash
from puna.runtime.progress import say
from puna.tokenizer.base import Tokenizer
from puna.tokenizer.extend import extend_tokenizer
from puna.tokenizer.load import load_tokenizer
from puna.weights.load import load_model, resolve, save_model

_ROW_MULTIPLE = 64


@dataclass(frozen=True, kw_only=True)
class ExtendConfig:
    """New tokens and a longer context for a trained model. What it computes for the old ones changes only where the
    rotary frequencies do; train it further on text that needs what is new."""

    model: Path
    """Model directory to start from."""
    output: Path
    """Gets the extended model directory, with its tokenizer."""
    tokens: tuple[str, ...] = ()
    """New ordinary tokens, recognised wherever they stand in a text; with the blank before a word: " guanaco"."""
    special_tokens: tuple[str, ...] = ()
    """New special tokens, which only code may produce."""
    context_length: int | None = None
    """The new context, in tokens."""
    rope_theta: float | None = None
    """New base of the rotary frequencies: a larger one slows all but the fastest (Roziere et al. 2023,
    arXiv:2308.12950, section 2.4: 1,000,000; Llama 3: 500,000)."""
    rope_scaling: RopeScaling | None = None
    """New scaling of the rotary frequencies, in place of the model's: `linear` or `llama3`."""

    def __post_init__(self) -> None:
        changed = (self.tokens, self.special_tokens, self.context_length, self.rope_theta, self.rope_scaling)
        if not any(changed):
            raise ValueError("There is nothing to extend: set tokens, special_tokens, context_length or rope_...")
        if self.rope_theta is not None and self.rope_theta <= 1:
            raise ValueError(f"rope_theta is {self.rope_theta}; it has to be above 1.")


def main(config: ExtendConfig) -> None:
    """Write the extended model.

    Raises:
        InputError: the model cannot be read, a token exists already, or a setting does not fit the model.
    """
    source = resolve(config.model)
    model = load_model(source)
    tokenizer = load_tokenizer(source)
    model.config = extended_context(model.config, config)
    if config.tokens or config.special_tokens:
        extended = extend_tokenizer(tokenizer, config.tokens, config.special_tokens)
        extend_rows(model, tokenizer, extended)
        tokenizer = extended
    results = {
        "num_new_tokens": len(config.tokens) + len(config.special_tokens),
        "vocab_size": tokenizer.vocab_size,
        "context_length": model.config.context_length,
    }
    manifest = Manifest("extend", to_plain(config), {str(source): content_hash(source)}, results)
    save_model(model, config.output, tokenizer=tokenizer, manifest=manifest)
    say(
        f"Wrote {config.output}: {results['num_new_tokens']} new tokens, {model.config.vocab_size:,} rows, a context "
        f"of {model.config.context_length:,} tokens."
    )


def extended_context(model: LlamaConfig, config: ExtendConfig) -> LlamaConfig:
    """The architecture with the context and the rotary frequencies that `config` asks for.

    Raises:
        InputError: the context would shrink, or `llama3` scaling starts from another context than the model's.
    """
    length = config.context_length or model.context_length
    if length < model.context_length:
        raise InputError(f"context_length ({length:,}) is less than the model's ({model.context_length:,}).")
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "llama3" and model.rope_scaling is None:
        original = scaling.original_context_length
        if original != model.context_length:
            raise InputError(
                f"rope_scaling.original_context_length is {original:,}, but the model was trained with a context of "
                f"{model.context_length:,}; llama3 scaling has to know that length."
            )
    return replace(
        model,
        context_length=length,
        rope_theta=config.rope_theta or model.rope_theta,
        rope_scaling=scaling or model.rope_scaling,
    )


@torch.no_grad()
def extend_rows(model: Transformer, old: Tokenizer, new: Tokenizer) -> None:
    """Make room for the ids that `new` has beyond `old`, in the embedding and in the output projection, in place.

    The row of a new token is the mean of the rows of its pieces: the ids that `old` makes of its text (as Hewitt 2021,
    "Initializing new word embeddings for pretrained language models", argues for means, here of what the token
    replaces). Rows that fill up to a multiple of 64 are the mean of all old ones.
    """
    pieces = [
        old.encode(new.token_bytes(i).decode(), allowed_special="all", continuation=True)
        for i in range(old.vocab_size, new.vocab_size)
    ]
    num_rows = max(model.config.vocab_size, -(-new.vocab_size // _ROW_MULTIPLE) * _ROW_MULTIPLE)
    with torch.device("meta"):
        embedding = nn.Embedding(num_rows, model.config.dim)
        output = Linear(model.config.dim, num_rows, bias=False)
    embedding.weight = nn.Parameter(_extended(model.embedding.weight, pieces, old.vocab_size, num_rows))
    output.weight = embedding.weight
    if not model.config.tie_embeddings:
        output.weight = nn.Parameter(_extended(model.output.weight, pieces, old.vocab_size, num_rows))
    model.embedding, model.output = embedding, output
    model.config = replace(model.config, vocab_size=num_rows)


def _extended(weight_VD: Tensor, pieces: Sequence[Sequence[int]], first: int, num_rows: int) -> Tensor:
    """`weight_VD` with `num_rows` rows: those from `first` on are means of the rows that `pieces` names."""
    mean_D = weight_VD[:first].float().mean(0)
    rows_VD = mean_D.to(weight_VD.dtype).repeat(num_rows, 1)
    rows_VD[: len(weight_VD)] = weight_VD
    for number, ids in enumerate(pieces):
        rows_VD[first + number] = weight_VD[torch.tensor(ids)].float().mean(0).to(weight_VD.dtype)
    return rows_VD
