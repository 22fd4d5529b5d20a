"""`puna quality_head`, and the step `llama_quality`: what a small Llama of ours thinks of a document.

A logistic regression on the mean of the model's last hidden states, as FineWeb-Edu's classifier is a regression on a
frozen encoder's (Penedo et al. 2024, arXiv:2406.17557, section 4) and Llama 3's quality classifiers stand on a small
model that learnt from Llama 2's verdicts (arXiv:2407.21783, section 3.1.1). The labels are yours: pages that are cited
or not, verdicts of a larger model, stars.

Shapes: N documents, B documents of a batch, T tokens, D model dimension.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from puna.config import to_plain
from puna.curate.document import Outcome, split
from puna.model.transformer import Linear, Transformer
from puna.runtime.devices import DeviceName, open_device
from puna.runtime.errors import InputError
from puna.runtime.files import atomic_path, read_documents
from puna.runtime.manifest import Manifest, content_hash
from puna.runtime.progress import progress, say
from puna.runtime.seeds import derive_seed
from puna.tokenizer.base import Tokenizer
from puna.tokenizer.load import load_tokenizer
from puna.weights.load import load_model

_HEAD_FILE = "head.safetensors"
_BATCH_TOKENS = 4096
_CHARACTERS_A_TOKEN = 16
"""Only this many characters are looked at for each token wanted."""


@dataclass(frozen=True, kw_only=True)
class QualityHeadConfig:
    """Teach a model to score documents."""

    model: Path
    """Model directory; a small one, since it will read the whole corpus."""
    documents: Path
    """Labelled documents with a "text" and an "id": a file or a folder of Parquet or JSON Lines."""
    output: Path
    """Folder for the head and a copy of the model, all that the step `llama_quality` needs; replaced when it exists."""
    label: str = "label"
    """The column with the labels: true or false, or a number from 0 to `max_label`."""
    max_label: float = 1.0
    """The best label, such as 5 for a score from 0 to 5."""
    max_tokens: int = 512
    """Look at the beginning of a document only."""
    weight_decay: float = 1e-3
    """Pulls the head's weights to zero; more where there are few labels."""
    held_out_share: float = 0.2
    """Share of the documents, chosen by their id, that the head is measured on instead of trained."""
    seed: int = 0
    """Of the choice of what is held out."""
    device: DeviceName = "auto"
    """auto (a GPU where there is one), cpu or cuda."""

    def __post_init__(self) -> None:
        if not 0 < self.held_out_share < 1:
            raise ValueError(f"held_out_share is {self.held_out_share}; it has to be between 0 and 1.")
        if self.max_tokens < 1 or self.max_label <= 0 or self.weight_decay < 0:
            raise ValueError("max_tokens has to be at least 1, max_label above 0, and weight_decay at least 0.")


@dataclass(frozen=True)
class LlamaQuality:
    """Score documents with a head on a small Llama, and reject those below a threshold.

    Adds the column `llama_quality_score`, 0 to 1.
    """

    kind: Literal["llama_quality"] = "llama_quality"
    """This step's name."""
    head: Path = Path()
    """Folder that `puna quality_head` wrote."""
    threshold: float = 0.5
    """Reject documents whose score is lower; 0 only adds the column."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the model computes."""

    def __post_init__(self) -> None:
        if self.head == Path():
            raise ValueError("llama_quality needs head, the folder that `puna quality_head` wrote.")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"The threshold of llama_quality is {self.threshold}; it has to be between 0 and 1.")

    def __call__(self, documents: pa.Table) -> Outcome:
        """Score and filter one batch of documents."""
        scores = load_head(self.head, self.device).score(documents["text"].to_pylist())
        column = "llama_quality_score"
        documents = documents.drop_columns([column] if column in documents.column_names else [])
        low = scores < self.threshold
        reasons = pa.array(np.where(low, "llama quality score too low", ""), mask=~low, type=pa.string())
        return split(documents.append_column(column, pa.array(scores)), reasons)


@dataclass(frozen=True)
class QualityHead:
    """A model and what turns its hidden states into a score."""

    model: Transformer
    tokenizer: Tokenizer
    weight_D: Tensor
    """float64, on the CPU."""
    bias: float
    max_tokens: int

    def score(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Scores from 0 to 1, to four digits (the rest depends on which texts are in one batch)."""
        features_ND = pooled_states(self.model, self.tokenizer, texts, self.max_tokens)
        return torch.sigmoid(features_ND @ self.weight_D + self.bias).numpy().round(4).astype(np.float32)


def main(config: QualityHeadConfig) -> None:
    """Train on a part of the labelled documents, measure on the other, and write the head."""
    device = open_device(config.device)
    model, tokenizer = load_model(config.model, device=device), load_tokenizer(config.model)
    texts, labels, is_held_out = _labelled(config)
    features_ND = pooled_states(model, tokenizer, texts, config.max_tokens, title="Reading labelled documents")
    labels_N, held_out_N = torch.tensor(labels, dtype=torch.float64), torch.tensor(is_held_out)
    weight_D, bias = fit_logistic(features_ND[~held_out_N], labels_N[~held_out_N], config.weight_decay)
    scores = torch.sigmoid(features_ND[held_out_N] @ weight_D + bias).numpy()
    truth = np.array(labels)[is_held_out] >= 0.5
    results = {
        "num_documents": len(texts),
        "num_held_out_documents": len(truth),
        "accuracy": float(((scores >= 0.5) == truth).mean()),
        "accuracy_of_the_commoner_label": float(max(truth.mean(), 1 - truth.mean())),
        "roc_auc": roc_auc(scores, truth),
        "max_tokens": config.max_tokens,
    }
    inputs = {str(path): content_hash(path) for path in (config.model, config.documents)}
    with atomic_path(config.output) as folder:
        shutil.copytree(config.model, folder / "model")
        save_file({"weight": weight_D, "bias": torch.tensor([bias], dtype=torch.float64)}, folder / _HEAD_FILE)
        Manifest("quality_head", to_plain(config), inputs, results).write(folder)
    say(
        f"On {len(truth):,} held-out documents: accuracy {results['accuracy']:.3f} (always the commoner label: "
        f"{results['accuracy_of_the_commoner_label']:.3f}), area under the ROC curve {results['roc_auc']:.3f}. "
        f"Wrote {config.output}"
    )


def _labelled(config: QualityHeadConfig) -> tuple[list[str], list[float], NDArray[np.bool_]]:
    """Texts, labels from 0 to 1, and which of them are held out."""
    texts, labels, held_out = [], [], []
    for row in read_documents(config.documents):
        label, text, name = row.get(config.label), row.get("text"), row.get("id")
        if not isinstance(text, str) or not isinstance(name, str):
            raise InputError(f'Every labelled document needs a string "text" and "id"; one has {sorted(row)}.')
        if not isinstance(label, bool | int | float) or not 0 <= label <= config.max_label:
            raise InputError(
                f"{config.documents}: {config.label!r} of document {name!r} is {label!r}; it has to be true, false, or "
                f"a number from 0 to {config.max_label:g} (max_label)."
            )
        texts.append(text)
        labels.append(label / config.max_label)
        held_out.append(derive_seed(config.seed, "hold out", name) < config.held_out_share * 2**63)
    is_held_out = np.array(held_out, dtype=bool)
    good = np.array(labels) >= 0.5
    for part, what in ((good[~is_held_out], "to train on"), (good[is_held_out], "held out")):
        if part.all() or not part.any():
            raise InputError(
                f"Of the documents {what}, {int(part.sum()):,} have a label of the upper half and "
                f"{int((~part).sum()):,} of the lower; there have to be some of both. Give more labelled documents."
            )
    return texts, labels, is_held_out


@cache
def load_head(folder: Path, device: str) -> QualityHead:
    """Load what `puna quality_head` wrote.

    Raises:
        InputError: it is not such a folder, or a file in it is broken.
    """
    manifest = Manifest.read(folder)
    if manifest.stage != "quality_head":
        raise InputError(f"{folder} is the output of `puna {manifest.stage}`, not of `puna quality_head`.")
    try:
        tensors = load_file(folder / _HEAD_FILE)
    except Exception as error:  # safetensors raises a class of its own, and OSError
        raise InputError(f"{folder / _HEAD_FILE} cannot be read ({error}). Train the head again.") from error
    model = load_model(folder / "model", device=device)
    tokenizer = load_tokenizer(folder / "model")
    return QualityHead(model, tokenizer, tensors["weight"], float(tensors["bias"]), manifest.results["max_tokens"])


def pooled_states(
    model: Transformer, tokenizer: Tokenizer, texts: Sequence[str], max_tokens: int, title: str | None = None
) -> Tensor:
    """The mean over tokens of each text's last hidden states, [N, D] in float64 on the CPU.

    Args:
        model: in evaluation mode; computes where it is.
        tokenizer: the model's.
        texts: of any length; their first `max_tokens` tokens are looked at.
        max_tokens: at most this many, and at most the model's context.
        title: of the progress bar; none without.
    """
    limit = min(max_tokens, model.config.context_length)
    before = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    encoded = tokenizer.encode_batch([text[: limit * _CHARACTERS_A_TOKEN] for text in texts])
    rows = [([*before, *ids] or [tokenizer.pad_id])[:limit] for ids in encoded]
    device = model.embedding.weight.device
    pooled_ND = torch.zeros(len(rows), model.config.dim, dtype=torch.float64)
    order = sorted(range(len(rows)), key=lambda number: len(rows[number]))

    def head(h_BTD: Tensor, _: Linear) -> Tensor:
        return h_BTD

    with torch.inference_mode(), progress(title or "Scoring", total=len(rows) if title else None) as advance:
        while order:
            longest = len(rows[order[-1]])
            batch = [order.pop() for _ in range(min(len(order), max(1, _BATCH_TOKENS // longest)))]
            ids_BT = torch.full((len(batch), longest), tokenizer.pad_id, dtype=torch.int64)
            for at, number in enumerate(batch):
                ids_BT[at, : len(rows[number])] = torch.tensor(rows[number])
            lengths_B = torch.tensor([len(rows[number]) for number in batch], device=device)
            # Attention is causal, so the padding behind a text changes nothing before it.
            h_BTD = model(ids_BT.to(device), head=head).double()
            real_BT = torch.arange(longest, device=device) < lengths_B[:, None]
            pooled_ND[batch] = ((h_BTD * real_BT[..., None]).sum(1) / lengths_B[:, None]).cpu()
            if title:
                advance(len(batch))
    return pooled_ND


def fit_logistic(features_ND: Tensor, labels_N: Tensor, weight_decay: float) -> tuple[Tensor, float]:
    """Weights and bias of the logistic regression of labels (0 to 1) on features, by L-BFGS in float64.

    Features are brought to mean 0 and variance 1 first, so that `weight_decay` means the same for every model; the
    weights returned apply to the features as they are.
    """
    mean_D, scale_D = features_ND.mean(0), features_ND.std(0).clamp(min=1e-9)
    standard_ND = (features_ND - mean_D) / scale_D
    weight_D = torch.zeros(features_ND.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight_D, bias], max_iter=200, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(standard_ND @ weight_D + bias, labels_N)
        loss = loss + weight_decay / 2 * weight_D.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(objective)  # type: ignore[no-untyped-call]
    plain_D = (weight_D / scale_D).detach()
    return plain_D, float(bias.detach() - plain_D @ mean_D)


def roc_auc(scores: NDArray[Any], truth: NDArray[np.bool_]) -> float:
    """Share of pairs of a true and a false document in which the true one has the higher score; ties count half."""
    values, place = np.unique(scores, return_inverse=True)
    counts = np.bincount(place, minlength=len(values))
    ranks = np.cumsum(counts) - (counts - 1) / 2
    positives = int(truth.sum())
    negatives = len(truth) - positives
    return float((ranks[place][truth].sum() - positives * (positives + 1) / 2) / (positives * negatives))
