"""Classes of texts, as a head on a model says them: for what needs a verdict on text, not a training.

Shapes: N texts, C classes.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from puna.peft.heads import last_logits, load_head_model
from puna.runtime.errors import InputError
from puna.runtime.manifest import FILE_NAME, Manifest
from puna.weights.load import resolve


class TextClassifier:
    """A classifier of single texts, as `puna finetune` writes for the task classification, or `transformers` does.

    Args:
        directory: model/ or adapter/ of the task, or a directory or name on the hub that `transformers` reads as a
            sequence classifier.
        device: where it computes.

    Attributes:
        labels: the classes, in the order of the head's outputs.
        max_tokens: the most tokens that it reads at once: what it was trained on, or the model's context.

    Raises:
        InputError: there is no head, or it is none that gives single texts classes.
    """

    def __init__(self, directory: Path, device: torch.device) -> None:
        found = resolve(directory)
        self._head = load_head_model(found, dtype=torch.float32)
        spec, manifest = self._head.spec, found / FILE_NAME
        trained = Manifest.read(found).config if manifest.is_file() else {}
        pairs = bool((trained.get("task") or {}).get("second_text"))
        # What transformers takes a head for that does not say: one number, or one class of several.
        problem = spec.config.get("problem_type") or ("regression" if len(spec.labels) == 1 else "single_label")
        if spec.architecture != "ForSequenceClassification" or problem == "regression" or pairs:
            what = "pairs of texts" if pairs else f"{spec.architecture}, {problem}"
            raise InputError(
                f"{directory} is for {what}, and no classifier of single texts, as `puna finetune` with task.kind = "
                '"classification" makes.'
            )
        if self._head.tokenizer.bos_id is None:
            raise InputError(f"The tokenizer in {directory} has no BOS token, with which each text has to begin.")
        self._bos_id = self._head.tokenizer.bos_id
        self._many = problem == "multi_label_classification"
        self._head.model.to(device)
        self.labels = spec.labels
        context = self._head.model.config.context_length
        self.max_tokens = min(context, int((trained.get("train") or {}).get("row_length", context)))

    def probabilities(self, texts: Sequence[str]) -> Tensor:
        """Of each class for each text, float32 [N, C]; they add up to 1 where a text has one class.

        A text longer than `max_tokens` is read in windows that overlap by half, and each class has the highest
        probability of any window: nothing of a text is overlooked for its length.
        """
        windows = [self._windows(text) for text in texts]
        logits_NC = last_logits(self._head, [ids for own in windows for ids in own])
        each_NC = logits_NC.sigmoid() if self._many else logits_NC.softmax(-1)
        return torch.stack([own_NC.amax(0) for own_NC in torch.split(each_NC, [len(own) for own in windows])])

    def columns(self, labels: Sequence[str]) -> list[int]:
        """The places of some classes among `labels`.

        Raises:
            InputError: there is no such class.
        """
        if unknown := [label for label in labels if label not in self.labels]:
            raise InputError(f"The classifier has no class {unknown[0]!r}; its classes are {', '.join(self.labels)}.")
        return [self.labels.index(label) for label in labels]

    def _windows(self, text: str) -> list[list[int]]:
        """BOS and a part of the text, in each."""
        ids = self._head.tokenizer.encode(text)
        room = self.max_tokens - 1
        step = max(1, room // 2)
        starts = range(0, max(1, len(ids) - room + step), step)
        return [[self._bos_id, *ids[start : start + room]] for start in starts]
