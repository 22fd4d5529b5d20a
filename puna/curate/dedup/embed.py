"""Documents as vectors, by a model of ours.

Shapes: B documents, T tokens, D model dimension.
"""

from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from puna.model.transformer import Transformer
from puna.runtime.devices import open_device
from puna.tokenizer.base import Tokenizer
from puna.tokenizer.load import load_tokenizer
from puna.weights.load import load_model

_TOKENS = 2**14
"""Tokens in a forward, padding included."""
_TOKEN_CHARACTERS = 32
"""No more of a text is encoded than so many characters for each token that is wanted."""


def embed_texts(model: Path, texts: list[str], max_tokens: int) -> NDArray[np.float32]:
    """Unit vectors [document, D]: the mean of the model's last hidden states over each text's first tokens.

    Args:
        model: a model directory.
        texts: one a document; a text without tokens becomes a vector of zeros.
        max_tokens: read no more of each text.
    """
    transformer, tokenizer, device = _load(model)
    beginnings = [text[: max_tokens * _TOKEN_CHARACTERS] for text in texts]
    ids = [tokens[:max_tokens] for tokens in tokenizer.encode_batch(beginnings)]
    vectors = np.zeros((len(texts), transformer.config.dim), np.float32)
    order = [document for document in sorted(range(len(ids)), key=lambda document: len(ids[document])) if ids[document]]
    while order:
        longest = len(ids[order[-1]])
        batch = [order.pop() for _ in range(min(len(order), max(_TOKENS // longest, 1)))]
        # Padding comes after every real token, so that causal attention never sees it.
        ids_BT = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids[document]) for document in batch], batch_first=True)
        lengths_B = torch.tensor([len(ids[document]) for document in batch])
        real_BT = torch.arange(ids_BT.shape[1]) < lengths_B[:, None]
        with torch.inference_mode():
            h_BTD = transformer(ids_BT.to(device), head=lambda h_BTD, output: h_BTD).float().cpu()
        mean_BD = (h_BTD * real_BT[:, :, None]).sum(1) / lengths_B[:, None]
        vectors[batch] = torch.nn.functional.normalize(mean_BD, dim=-1).numpy()
    return vectors


@cache
def _load(model: Path) -> tuple[Transformer, Tokenizer, torch.device]:
    device = open_device("auto", torch.get_num_threads())
    return load_model(model, device=device), load_tokenizer(model), device
