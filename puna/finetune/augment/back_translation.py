"""Texts translated into another language and back (Sennrich et al. 2016, arXiv:1511.06709; as augmentation Xie et al.
2020, "UDA", arXiv:1904.12848, section 2.2), by translation models of one's own."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from puna.finetune.augment.method import Augmenter, Variants, distinct
from puna.infer.config import EngineConfig
from puna.infer.llm import LLM
from puna.infer.sampling import SamplingParams
from puna.runtime.progress import say


@dataclass(frozen=True)
class BackTranslation(Augmenter):
    """Translate into another language and back, by two models such as `puna finetune` makes (task translation)."""

    there: Path
    """Model directory that translates into the other language."""
    back: Path
    """Model directory that translates back; the same again where one model does both."""
    kind: Literal["back_translation"] = "back_translation"
    """This way's name."""
    there_prompt: str = "{text}\n"
    """What the first is asked, with {text} in the place of the text: what `task.prompt` was in its training."""
    back_prompt: str = "{text}\n"
    """The same for the second."""
    temperature: float = 0.8
    """Of the first translation; higher gives more variety and less sense. The way back is greedy."""
    max_tokens: int = 128
    """The most tokens of a translation. Texts whose translation is longer are left out."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the models run."""

    def __post_init__(self) -> None:
        for name in ("there_prompt", "back_prompt"):
            if "{text}" not in getattr(self, name):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it needs {{text}}, where the text belongs.")
        if self.temperature <= 0 or self.max_tokens < 1:
            raise ValueError("temperature has to be above 0, and max_tokens at least 1.")

    def files(self) -> list[Path]:
        """See `Augmenter.files`."""
        return [self.there, self.back]

    def texts(self, texts: Sequence[str], copies: int, seed: int) -> Variants:
        """See `Augmenter.texts`."""
        sampling = SamplingParams(temperature=self.temperature, max_tokens=self.max_tokens, seed=seed)
        there = self._translate(self.there, self.there_prompt, texts, sampling, copies)
        greedy = SamplingParams(temperature=0, max_tokens=self.max_tokens)
        flat = [translation for translations in there for translation in translations]
        back = iter(self._translate(self.back, self.back_prompt, flat, greedy, 1))
        found = [
            distinct(text, [final for _ in translations for final in next(back)])
            for text, translations in zip(texts, there, strict=True)
        ]
        lost = len(texts) * copies - sum(map(len, found))
        say(f"{lost:,} of {len(texts) * copies:,} translations came back as they went, twice, empty or cut off.")
        return found

    def _translate(
        self, model: Path, prompt: str, texts: Sequence[str], params: SamplingParams, copies: int
    ) -> list[list[str]]:
        """For each text its translations that came to an end."""
        llm = LLM(model, EngineConfig(device=self.device))
        outputs = llm.generate([prompt.replace("{text}", text) for text in texts], params, n=copies)
        return [
            distinct("", [part.text for part in output.completions if part.finish_reason == "stop"])
            for output in outputs
        ]
