"""Words replaced by others of about the same meaning (Wei and Zou 2019, "EDA", arXiv:1901.11196), the unimportant ones
rather than the important ones (Xie et al. 2020, "UDA", arXiv:1904.12848, appendix on TF-IDF).

Shapes: W words, D model dimension.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch.nn.functional as F

from puna.batches.tables import text_lines
from puna.finetune.augment.method import Augmenter, Variants, distinct
from puna.finetune.tasks.tags import Sentence
from puna.runtime.errors import InputError
from puna.runtime.seeds import derive_seed
from puna.tokenizer.load import load_tokenizer
from puna.weights.load import load_model

_WORD = re.compile(r"(\w+(?:['’-]\w+)*)")


@dataclass(frozen=True)
class Synonyms(Augmenter):
    """Replace words by synonyms: of a file of your own, or by words that stand in similar places for a model."""

    kind: Literal["synonyms"] = "synonyms"
    """This way's name."""
    file: Path | None = None
    """A text file whose lines each have words of about the same meaning, with commas or tabs between; "big, large"."""
    model: Path | None = None
    """In place of a file, a model directory: alike are the words whose embeddings are. These are often opposites, too
    (good and bad), so look at what comes out, and put the words that decide the label into `protected`."""
    share: float = 0.15
    """Share of a text's words that is replaced on average, as far as so many have synonyms."""
    by_importance: bool = True
    """Replace words the likelier, the lower their TF-IDF in this data is: what tells this text from others stays. Else
    all are equally likely."""
    protected: tuple[str, ...] = ()
    """Words that are never replaced, such as "not"."""
    entities: bool = False
    """With tagged words: replace those within entities, too."""
    neighbours: int = 3
    """With `model`: choose among so many words that are most alike."""
    min_similarity: float = 0.4
    """With `model`: cosine of two embeddings, less their mean, from which on words count as alike."""

    def __post_init__(self) -> None:
        if (self.file is None) == (self.model is None):
            raise ValueError("Synonyms come from one of file and model: set one of them.")
        if not 0 < self.share <= 1:
            raise ValueError(f"share is {self.share}; it has to be above 0 and at most 1.")
        if self.neighbours < 1:
            raise ValueError(f"neighbours is {self.neighbours}; it has to be at least 1.")

    def files(self) -> list[Path]:
        """See `Augmenter.files`."""
        return [path for path in (self.file, self.model) if path is not None]

    def texts(self, texts: Sequence[str], copies: int, seed: int) -> Variants:
        """See `Augmenter.texts`. Between words everything stays as it is."""
        # re.split puts what is between the words at the even places.
        split = [_WORD.split(text) for text in texts]
        replace = self._open([parts[1::2] for parts in split])
        found = []
        for number, (text, parts) in enumerate(zip(texts, split, strict=True)):
            variants = []
            for copy in range(copies):
                generator = np.random.default_rng(derive_seed(seed, "synonyms", number, copy))
                fresh = list(parts)
                fresh[1::2] = replace(parts[1::2], generator, lambda at, word: True)
                variants.append("".join(fresh))
            found.append(distinct(text, variants))
        return found

    def sentences(self, sentences: Sequence[Sentence], copies: int, seed: int) -> list[list[list[str]]]:
        """See `Augmenter.sentences`. A word is replaced by one word."""
        replace = self._open([sentence.words for sentence in sentences])
        found = []
        for number, sentence in enumerate(sentences):

            def may(at: int, word: str, tags: Sequence[str] = sentence.tags) -> bool:
                return (self.entities or tags[at] == "O") and not re.search(r"\s", word)

            variants = {}
            for copy in range(copies):
                generator = np.random.default_rng(derive_seed(seed, "synonyms", number, copy))
                words = replace(sentence.words, generator, may)
                if words != sentence.words:
                    variants[tuple(words)] = words
            found.append(list(variants.values()))
        return found

    def _open(self, texts: Sequence[Sequence[str]]) -> Callable[..., list[str]]:
        """A function (words, generator, may) that replaces words of a text, where may(place, other word) allows it."""
        known = {word.lower() for words in texts for word in words}
        if self.file is not None:
            table = read_synonyms(self.file)
        else:
            assert self.model is not None
            table = similar_words(self.model, sorted(known), self.neighbours, self.min_similarity)
        table = {word: others for word, others in table.items() if word not in map(str.lower, self.protected)}
        if not known & table.keys():
            raise InputError(f"No word of this data has a synonym in {self.file or self.model}.")
        documents = Counter(word for words in texts for word in {word.lower() for word in words})
        rarity = {word: math.log(len(texts) / count) for word, count in documents.items()}

        def replace(words: Sequence[str], generator: np.random.Generator, may: Callable[[int, str], bool]) -> list[str]:
            others = [
                [other for other in table.get(word.lower(), ()) if may(at, other)] for at, word in enumerate(words)
            ]
            chances = self.chances([word.lower() for word in words], list(map(bool, others)), rarity)
            fresh = list(words)
            for at in np.flatnonzero(generator.random(len(words)) < np.asarray(chances)).tolist():
                fresh[at] = in_case_of(words[at], others[at][int(generator.integers(len(others[at])))])
            return fresh

        return replace

    def chances(self, words: Sequence[str], replaceable: Sequence[bool], rarity: Mapping[str, float]) -> list[float]:
        """The chance of each word of a text to be replaced. They add up to `share` of the words, where so many can be.

        By importance it is min(p (C - t) / Z, 1), t being the word's TF-IDF, C the largest in the text, Z the mean of
        C - t over the words that can be replaced (UDA), and p their mean chance.

        Args:
            replaceable: which words have synonyms.
            rarity: each word's inverse document frequency.
        """
        if not any(replaceable):
            return [0.0] * len(words)
        mean_chance = min(self.share * len(words) / sum(replaceable), 1.0)
        counts = Counter(words)
        scores = [counts[word] / len(words) * rarity[word] for word in words]
        below = [(max(scores) - score) * can for score, can in zip(scores, replaceable, strict=True)]
        mean = sum(below) / sum(replaceable)
        if not self.by_importance or mean == 0:
            return [mean_chance * can for can in replaceable]
        return [min(mean_chance * distance / mean, 1.0) for distance in below]


def read_synonyms(path: Path) -> dict[str, list[str]]:
    """Each word of a file in small letters, and those that stand in a line with it.

    Raises:
        InputError: the file is absent or not UTF-8, a line has no more than one word, or there is none.
    """
    table: dict[str, dict[str, None]] = {}
    for number, line in text_lines(path):
        if not line.strip():
            continue
        words = list(dict.fromkeys(word.strip().lower() for word in re.split(r"[,\t]", line) if word.strip()))
        if len(words) < 2:
            raise InputError(
                f"{path}, line {number} has only {line.strip()!r}; a line has synonyms with commas between."
            )
        for word in words:
            table.setdefault(word, {}).update(dict.fromkeys(other for other in words if other != word))
    if not table:
        raise InputError(f"{path} holds no synonym.")
    return {word: list(others) for word, others in table.items()}


def similar_words(model: Path, words: Iterable[str], neighbours: int, min_similarity: float) -> dict[str, list[str]]:
    """For words that are one token, those of the others whose embeddings are most alike.

    Raises:
        InputError: hardly any of the words is one token.
    """
    tokenizer = load_tokenizer(model)
    ids = {}
    for word in words:
        pieces = tokenizer.encode(" " + word, continuation=True)
        if len(pieces) == 1:
            ids[word] = pieces[0]
    if len(ids) < 2:
        raise InputError(
            f"Of the words of this data the tokenizer in {model} takes {len(ids)} as one token, so that its embeddings "
            "say nothing about words. Give a file of synonyms."
        )
    embeddings_WD = load_model(model).embedding.weight.detach().float()[list(ids.values())]
    embeddings_WD = F.normalize(embeddings_WD - embeddings_WD.mean(0), dim=-1)
    names, found = list(ids), {}
    for row, word in enumerate(names):
        cosines_W = embeddings_WD @ embeddings_WD[row]
        cosines_W[row] = -1
        values, places = cosines_W.topk(min(neighbours, len(names) - 1))
        pairs = zip(values.tolist(), places.tolist(), strict=True)
        if alike := [names[place] for value, place in pairs if value >= min_similarity]:
            found[word] = alike
    return found


def in_case_of(original: str, word: str) -> str:
    """A word in capitals where the original is, or with one where the original begins with one."""
    if len(original) > 1 and original.isupper():
        return word.upper()
    return word[:1].upper() + word[1:] if original[:1].isupper() else word
