"""What one would take without a language model: the classical method for each form of task of `task_data.py`.

Classification is logistic regression on TF-IDF of words and pairs of words (of one to three characters in Chinese):
for pairs of texts, of what the two have in common and what not; for relations, of what stands between. Tags come from
a linear-chain CRF over the usual features of a word and its neighbours. Answers to questions come from the most similar
sentence, translations from IBM model 1, summaries from the first turns; only the second of these learns.
"""

import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from task_data import DataSet, Rows

_C = 10.0
"""Inverse of the regularisation of logistic regression: the best of 1, 10 and 100 on most sets of this kind."""


def baseline(data_set: DataSet, train: Rows, held_out: Rows) -> tuple[str, float]:
    """The method's name and the figure of the table."""
    name, predict = _BASELINES[data_set.form]
    return name, predict(data_set, train, held_out)


def _vectorizer(data_set: DataSet) -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer

    units = {"analyzer": "char", "ngram_range": (1, 3)} if data_set.chinese else {"ngram_range": (1, 2)}
    return TfidfVectorizer(sublinear_tf=True, min_df=1, **units)


def _fit_and_score(data_set: DataSet, train: tuple[Any, Sequence[str]], held_out: tuple[Any, Sequence[str]]) -> float:
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import accuracy_score, f1_score

    given = LogisticRegression(C=_C, max_iter=1000).fit(*train).predict(held_out[0])
    if data_set.metric == "validation/accuracy":
        return float(accuracy_score(held_out[1], given))
    return float(f1_score(held_out[1], given, average="macro", zero_division=0))


def _texts(data_set: DataSet, train: Rows, held_out: Rows) -> float:
    vectorizer = _vectorizer(data_set).fit([row["text"] for row in train])
    sides = [
        (vectorizer.transform([row["text"] for row in rows]), [row["label"] for row in rows])
        for rows in (train, held_out)
    ]
    return _fit_and_score(data_set, sides[0], sides[1])


def _pairs(data_set: DataSet, train: Rows, held_out: Rows) -> float:
    """Products and distances of both texts' weights, their cosine, and how far their lengths differ."""
    import numpy as np
    from scipy.sparse import csr_matrix, hstack

    vectorizer = _vectorizer(data_set).fit([row[column] for row in train for column in ("text", "other")])

    def features(rows: Rows) -> Any:
        one, other = (vectorizer.transform([row[column] for row in rows]) for column in ("text", "other"))
        common = one.multiply(other)
        cosine = np.asarray(common.sum(1))
        lengths = np.array(
            [[abs(len(row["text"]) - len(row["other"])) / max(len(row["text"]), len(row["other"]))] for row in rows]
        )
        return hstack([common, abs(one - other), csr_matrix(cosine), csr_matrix(lengths)])

    sides = [(features(rows), [row["label"] for row in rows]) for rows in (train, held_out)]
    return _fit_and_score(data_set, sides[0], sides[1])


def word_features(words: Sequence[str], at: int) -> dict[str, Any]:
    """A word, its endings and shape, and the same of its neighbours."""
    features: dict[str, Any] = {"bias": 1.0}
    for offset in (-2, -1, 0, 1, 2):
        if not 0 <= at + offset < len(words):
            features[f"{offset}:outside"] = True
            continue
        word = words[at + offset]
        shape = re.sub(r"\d", "0", re.sub(r"[a-z]", "x", re.sub(r"[A-Z]", "X", word)))
        features |= {f"{offset}:word": word.lower(), f"{offset}:shape": re.sub(r"(.)\1+", r"\1", shape)}
        if abs(offset) < 2:
            features |= {
                f"{offset}:end": word[-3:],
                f"{offset}:title": word.istitle(),
                f"{offset}:capitals": word.isupper(),
            }
            features |= {f"{offset}:digits": word.isdigit(), f"{offset}:begin": word[:3]}
    for first, second in ((-1, 0), (0, 1)):
        if at + first >= 0 and at + second < len(words):
            features[f"{first}{second}:words"] = f"{words[at + first]} {words[at + second]}".lower()
    return features


def _tags(data_set: DataSet, train: Rows, held_out: Rows) -> float:
    import sklearn_crfsuite

    from puna.finetune.tasks.tagging import entity_scores
    from puna.finetune.tasks.tags import Sentence, detect_scheme, entities, to_tags

    def sentences(rows: Rows) -> tuple[list[Any], list[list[str]]]:
        plain = [Sentence(row["tokens"], row["tags"], [""] * len(row["tokens"])) for row in rows]
        scheme = detect_scheme(plain)
        tags = [to_tags(entities(each, scheme), len(each.words), "BIO2") for each in plain]
        return [[word_features(each.words, at) for at in range(len(each.words))] for each in plain], tags

    model = sklearn_crfsuite.CRF(algorithm="lbfgs", c1=0.1, c2=0.1, max_iterations=100, all_possible_transitions=True)
    model.fit(*sentences(train))
    features, wanted = sentences(held_out)
    return entity_scores(wanted, [list(tags) for tags in model.predict(features)], "BIO2")[0]["validation/f1"]


def _answers(data_set: DataSet, train: Rows, held_out: Rows) -> float:
    from puna.finetune.tasks.spans import overlap_f1

    unit = "characters" if data_set.chinese else "words"
    found = [(find_answer(row["question"], row["context"], data_set.chinese), row["answers"]) for row in held_out]
    return statistics.mean(max(overlap_f1(given, each["text"], unit) for each in answers) for given, answers in found)


def find_answer(question: str, context: str, chinese: bool) -> str:
    """In the sentence whose words the question shares most, weighed by how rare they are in the text, those words
    between punctuation that the question has not and that stand nearest to the ones it has."""
    word = re.compile(r"\w" if chinese else r"\w+")
    asked = {match[0].lower() for match in word.finditer(question)}
    counts = Counter(match[0].lower() for match in word.finditer(context))
    weight = {each: math.log(1 + sum(counts.values()) / counts[each]) for each in asked & counts.keys()}
    sentences = re.split(r"(?<=[.!?])\s+|(?<=[。！？])", context)
    best = max(sentences, key=lambda text: sum(weight.get(each, 0.0) for each in set(word.findall(text.lower()))))
    words = list(word.finditer(best))
    known = [(at, weight[match[0].lower()]) for at, match in enumerate(words) if match[0].lower() in weight]
    candidates: list[list[int]] = [[]]
    for at, match in enumerate(words):
        if match[0].lower() in asked or (at and re.search(r"[^\w\s]", best[words[at - 1].end() : match.start()])):
            candidates.append([])
        if match[0].lower() not in asked:
            candidates[-1].append(at)
    candidates = [each for each in candidates if each]
    if not candidates:
        return ""

    def nearness(stretch: list[int]) -> float:
        return sum(value / min(abs(at - stretch[0]), abs(at - stretch[-1])) for at, value in known)

    chosen = max(candidates, key=nearness)
    return best[words[chosen[0]].start() : words[chosen[-1]].end()]


def _relations(data_set: DataSet, train: Rows, held_out: Rows) -> float:
    """Words from the first entity to the second, with their places apart, scored as SemEval does."""
    from sklearn.linear_model import LogisticRegression

    from puna.finetune.tasks.relations import relation_f1

    def around(row: dict[str, Any]) -> str:
        text = re.sub(r"</?e\d>", " ", re.sub(r"<e(\d)>(.*?)</e\d>", r" first\1_\2 ", row["text"]))
        begin, end = row["text"].find("<e1>"), row["text"].find("</e2>")
        return text if begin < 0 or end < begin else " ".join([row["text"][begin:end], row["text"][end:][:20]])

    vectorizer = _vectorizer(data_set)
    model = LogisticRegression(C=_C, max_iter=1000)
    model.fit(vectorizer.fit_transform(map(around, train)), [row["label"] for row in train])
    wanted = [row["label"] for row in held_out]
    given = [str(label) for label in model.predict(vectorizer.transform(map(around, held_out)))]
    return statistics.mean(relation_f1(wanted, given, sorted({row["label"] for row in train}), "Other").values())


def _translations(data_set: DataSet, train: Rows, held_out: Rows) -> float:
    """Each word's likeliest translation (Brown et al. 1993, "The Mathematics of Statistical Machine Translation",
    section 4.2), in the order of the source."""
    from collections import defaultdict

    from puna.finetune.text.scores import chrf

    pairs = [(re.findall(r"\w+|\W", row["en"].lower()), re.findall(r"\w+|[^\w\s]", row["de"])) for row in train]
    pairs = [([word for word in source if not word.isspace()], target) for source, target in pairs]
    likely: dict[str, dict[str, float]] = {}
    for step in range(5):
        counts: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        for source, target in pairs:
            for word in target:
                weights = [likely[other].get(word, 0.0) if step else 1.0 for other in source]
                total = sum(weights)
                for other, weight in zip(source, weights, strict=True):
                    counts[other][word] += weight / total
        likely = {
            other: {word: count / sum(of.values()) for word, count in of.items() if count > 1e-4 * sum(of.values())}
            for other, of in counts.items()
        }
    best = {word: max(of, key=of.__getitem__) for word, of in likely.items()}
    given = [" ".join(best.get(w, w) for w in re.findall(r"\w+|[^\w\s]", row["en"].lower())) for row in held_out]
    return chrf(given, [row["de"] for row in held_out]) / 100


def _summaries(data_set: DataSet, train: Rows, held_out: Rows) -> float:
    from puna.finetune.text.scores import rouge

    given = ["\n".join(row["text"].splitlines()[:3]) for row in held_out]
    return rouge(given, [row["summary"] for row in held_out], "words")["rougeL"]


_BASELINES: dict[str, tuple[str, Callable[[DataSet, Rows, Rows], float]]] = {
    "classification": ("TF-IDF + logistic regression", _texts),
    "relations": ("TF-IDF of what stands between the entities + logistic regression", _relations),
    "pairs": ("TF-IDF of both + logistic regression", _pairs),
    "tagging": ("CRF", _tags),
    "spans": ("most similar sentence, nearest words", _answers),
    "translation": ("IBM model 1, word by word", _translations),
    "summarisation": ("the first three turns", _summaries),
}
