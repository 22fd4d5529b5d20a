"""Multiple choice by log-likelihood: the answer that the model finds likeliest is the one it gives."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from puna.evaluate.tasks.calibration import calibration_error
from puna.evaluate.tasks.request import Answer, Continuation, Likelihood, Prompt, Request
from puna.evaluate.tasks.task import Example, Metric, Score, Task


@dataclass(frozen=True, kw_only=True)
class MultipleChoice(Task):
    """Scores every answer as a continuation of the question.

    - accuracy: the likeliest answer is right;
    - accuracy_by_characters, accuracy_by_bytes: the same with log-likelihoods divided by the answer's length, so that
      long answers stand a chance (acc_norm and acc_bytes of lm-eval);
    - calibration_error: how far the probability of the chosen answer, among all, is from how often it is right.
    """

    def delimiter(self) -> str:
        """What stands between question and answer; a chat's answer begins with nothing."""
        return "" if self.chat else " "

    def contexts(self, example: Example, shots: Sequence[Example]) -> list[Prompt]:
        """What stands before each answer: here, the question before all."""
        return [self.compose(example, shots)] * len(example.choices)

    def continuations(self, example: Example) -> list[str]:
        """What is scored after each of them."""
        return [self.delimiter() + choice for choice in example.choices]

    def requests(self, example: Example, shots: Sequence[Example]) -> list[Request]:
        """One continuation for each choice."""
        pairs = zip(self.contexts(example, shots), self.continuations(example), strict=True)
        return [Continuation(context, text) for context, text in pairs]

    def score(self, example: Example, answers: Sequence[Answer]) -> Score:
        """Ties go to the answer that stands first, as in lm-eval."""
        logs = np.array([answer.log_likelihood for answer in cast(Sequence[Likelihood], answers)])
        chosen = int(logs.argmax())
        by_characters = int((logs / [len(choice) for choice in example.choices]).argmax())
        by_bytes = int((logs / [len(choice.encode()) for choice in example.choices]).argmax())
        weights = np.exp(logs - logs.max())
        return Score(
            {
                "accuracy": float(chosen == example.gold),
                "accuracy_by_characters": float(by_characters == example.gold),
                "accuracy_by_bytes": float(by_bytes == example.gold),
            },
            {
                "log_likelihoods": logs.tolist(),
                "chosen": chosen,
                "gold": example.gold,
                "confidence": float(weights.max() / weights.sum()),
            },
        )

    def metrics(self, examples: Sequence[Example], scores: Sequence[Score]) -> dict[str, Metric]:
        """Means, and how well calibrated the model is."""
        confidences = [score.record["confidence"] for score in scores]
        right = [score.values["accuracy"] for score in scores]
        return super().metrics(examples, scores) | {"calibration_error": calibration_error(confidences, right)}
