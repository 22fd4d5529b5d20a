"""Models of random weights for both sides of a benchmark, with a tokenizer trained on the benchmark's own text."""

from collections.abc import Iterable
from pathlib import Path

SHAPES: dict[str, dict[str, int]] = {
    "3M, 4k vocabulary": {
        "vocab_size": 4096,
        "dim": 192,
        "num_layers": 4,
        "num_heads": 3,
        "num_kv_heads": 3,
        "head_dim": 64,
        "hidden_dim": 512,
    },
    "15M, 8k vocabulary": {
        "vocab_size": 8192,
        "dim": 384,
        "num_layers": 6,
        "num_heads": 6,
        "num_kv_heads": 6,
        "head_dim": 64,
        "hidden_dim": 1024,
    },
    "100M, 20k vocabulary": {
        "vocab_size": 20000,
        "dim": 768,
        "num_layers": 12,
        "num_heads": 12,
        "num_kv_heads": 4,
        "head_dim": 64,
        "hidden_dim": 2048,
    },
    "1B, 8k vocabulary": {
        "vocab_size": 8192,
        "dim": 2048,
        "num_layers": 16,
        "num_heads": 32,
        "num_kv_heads": 8,
        "head_dim": 64,
        "hidden_dim": 8192,
    },
}
CPU_SHAPES, GPU_SHAPES = ("3M, 4k vocabulary", "15M, 8k vocabulary"), ("1B, 8k vocabulary",)


def write_model(
    shape: dict[str, int], texts: Iterable[str], context_length: int, folder: Path, num_tokens: int | None = None
) -> None:
    """Write `folder`/model, which answers in Llama 3's chat format.

    Args:
        num_tokens: of the tokenizer; absent, as many as the model has.
    """
    import torch

    from puna.model.config import LlamaConfig
    from puna.model.initialize import initialize
    from puna.model.transformer import Transformer
    from puna.runtime.files import write_jsonl
    from puna.tokenizer.chat_template import builtin_template
    from puna.tokenizer.load import load_tokenizer
    from puna.tokenizer.train import TokenizerConfig
    from puna.tokenizer.train import main as train_tokenizer
    from puna.weights.load import save_model

    write_jsonl(folder / "texts.jsonl", ({"id": str(number), "text": text} for number, text in enumerate(texts)))
    size = num_tokens or shape["vocab_size"]
    train_tokenizer(TokenizerConfig(documents=folder / "texts.jsonl", output=folder / "tokenizer", vocab_size=size))
    tokenizer = load_tokenizer(folder / "tokenizer")
    tokenizer.chat_template = builtin_template("llama3")
    model = Transformer(LlamaConfig(**shape, context_length=context_length))
    initialize(model, 0)
    save_model(model, folder / "model", tokenizer=tokenizer, dtype=torch.float32)
