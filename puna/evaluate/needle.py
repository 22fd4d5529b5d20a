"""`puna needle`: does a model find one sentence in a long text, wherever it stands?

A sentence with a random number is put into the text at some depth, and asked for at the end (Kamradt 2023, "Needle in
a haystack"). The answer is read off a single forward pass: greedy decoding gives it if and only if, after the question
and each beginning of the answer, the answer's next token is the likeliest.

Shapes: B rows, T tokens, A tokens of the answer, D model dimension, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

import torch
import torch.nn.functional as F
from torch import Tensor

from puna.batches.encode import tokenize_documents
from puna.config import to_plain
from puna.evaluate.tasks.needle import NEEDLE, QUESTION, check_settings, draw
from puna.model.transformer import Linear, Transformer
from puna.runtime.devices import DeviceName, open_device
from puna.runtime.errors import InputError
from puna.runtime.files import atomic_path, read_documents, write_json
from puna.runtime.manifest import Manifest, content_hash
from puna.runtime.page import new_figure, to_svg, write_page
from puna.runtime.progress import progress, say
from puna.tokenizer.base import Tokenizer
from puna.tokenizer.load import load_tokenizer
from puna.weights.load import load_model, resolve

_PAGE = """{% extends "page" %}
{% block content %}
<p>Share of {{ trials }} needles found at each depth (0: the beginning) and length, in tokens, and the mean loss on the
number, in nats per token. Text: {{ documents }}.</p>
{{ svg | safe }}
<table><tr><th>depth</th>{% for length in lengths %}<th class="number">{{ "{:,}".format(length) }}</th>{% endfor %}</tr>
{% for depth, cells in rows %}<tr><td>{{ "{:.0%}".format(depth) }}</td>
{% for cell in cells %}<td class="number">{{ "{:.0%}".format(cell.recall) }} ({{ "{:.2f}".format(cell.nats) }})</td>
{% endfor %}</tr>{% endfor %}</table>
{% endblock %}
"""


@dataclass(frozen=True, kw_only=True)
class NeedleConfig:
    """Hide a sentence in long texts, at several depths and lengths, and see whether the model finds it."""

    model: Path
    """Model directory."""
    documents: Path
    """Text to hide it in: documents with "text" and "id", Parquet or JSON Lines, a file or a folder of them."""
    output: Path
    """Folder to write results.json and needle.html (a table and a plot) to; replaced when it exists."""
    lengths: tuple[int, ...] = ()
    """Lengths of the whole prompt, in tokens; absent: a quarter, a half and all of the model's context. Longer ones
    than the context are allowed."""
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Where the sentence stands: 0 is the beginning, 1 just before the question."""
    trials: int = 4
    """Texts for each length and depth."""
    needle: str = NEEDLE
    """The sentence; {city} and {number} are filled in."""
    question: str = QUESTION
    """What stands at the end, for the model to go on with a blank and the number."""
    seed: int = 0
    """Of cities, numbers and the places where texts begin."""
    device: DeviceName = "auto"
    """auto (a GPU where there is one), cpu or cuda."""
    num_threads: int = 0
    """CPU threads; 0 is every core that the process may run on."""

    def __post_init__(self) -> None:
        check_settings(self.depths, self.trials, self.needle, self.question)


@dataclass(frozen=True)
class Cell:
    """What was measured at one length and depth."""

    length: int
    """Tokens of the whole prompt."""
    depth: float
    """Where the needle stood, 0 to 1."""
    recall: float
    """Share of needles found."""
    nats: float
    """Mean loss of the number's tokens."""


@dataclass(frozen=True)
class Prompt:
    """A text with a needle and the question."""

    ids: list[int]
    """BOS, text, needle, text, question."""
    answer: list[int]
    """Ids of the blank and the number that should follow."""


def main(config: NeedleConfig) -> None:
    """Measure, print the table, and write results.json, needle.html and the manifest.

    Raises:
        InputError: the model or the text cannot be read, a length is too short for needle and question, or matplotlib
            is absent.
    """
    figure = new_figure(8, 4)
    source = resolve(config.model)
    device = open_device(config.device, config.num_threads)
    tokenizer = load_tokenizer(source)
    model = load_model(source, device=device)
    haystack = read_haystack(tokenizer, config.documents)
    context = model.config.context_length
    lengths = config.lengths or tuple(sorted({context // 4, context // 2, context}))
    cells = measure(model, tokenizer, haystack, config, lengths)
    inputs = {str(path): content_hash(path) for path in (source, config.documents)}
    rows = [(depth, [cell for cell in cells if cell.depth == depth]) for depth in config.depths]
    _draw(figure, rows, lengths)
    with atomic_path(config.output) as folder:
        folder.mkdir()
        write_json(folder / "results.json", [asdict(cell) for cell in cells])
        manifest = Manifest("needle", to_plain(config), inputs, {"needle_recall": mean(cell.recall for cell in cells)})
        manifest.write(folder)
        write_page(
            folder / "needle.html",
            _PAGE,
            title=f"Needle in a haystack: {config.model.name}",
            created=manifest.created,
            trials=config.trials,
            documents=config.documents.name,
            svg=to_svg(figure),
            lengths=lengths,
            rows=rows,
        )
    say(f"{'depth':>6} " + "".join(f"{length:>10,}" for length in lengths))
    for depth, row in rows:
        say(f"{depth:>6.0%} " + "".join(f"{cell.recall:>10.0%}" for cell in row))


def read_haystack(tokenizer: Tokenizer, documents: Path) -> list[int]:
    """Ids of all documents, one after another, without special tokens.

    Raises:
        InputError: there is no text.
    """
    rows = tokenize_documents(tokenizer, read_documents(documents))
    ids = [i for row, _ in rows for i in row if i not in tokenizer.special_ids]
    if not ids:
        raise InputError(f"{documents} holds no text to hide anything in.")
    return ids


def measure(
    model: Transformer, tokenizer: Tokenizer, haystack: Sequence[int], config: NeedleConfig, lengths: Sequence[int]
) -> list[Cell]:
    """A cell for each length and depth."""
    cells = []
    with progress("Looking for needles", total=len(lengths) * len(config.depths)) as advance:
        for length in lengths:
            for depth in config.depths:
                prompts = [
                    make_prompt(tokenizer, haystack, config, length, depth, trial) for trial in range(config.trials)
                ]
                scored = [score(model, prompt) for prompt in prompts]
                cells.append(Cell(length, depth, mean(hit for hit, _ in scored), mean(nats for _, nats in scored)))
                advance()
    return cells


def make_prompt(
    tokenizer: Tokenizer, haystack: Sequence[int], config: NeedleConfig, length: int, depth: float, trial: int
) -> Prompt:
    """A prompt of exactly `length` tokens, the same for the same arguments.

    Raises:
        InputError: needle and question need more tokens than that.
    """
    chance, city, number = draw(config.seed, length, depth, trial)
    needle = tokenizer.encode(config.needle.format(city=city, number=number), continuation=True)
    question = tokenizer.encode(config.question.format(city=city), continuation=True)
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    room = length - len(bos) - len(needle) - len(question)
    if room < 0:
        raise InputError(
            f"A length of {length} tokens has no room for needle and question, which take {length - room}."
        )
    start = chance.randrange(len(haystack))
    text = [haystack[(start + n) % len(haystack)] for n in range(room)]
    place = round(depth * room)
    ids = [*bos, *text[:place], *needle, *text[place:], *question]
    return Prompt(ids, tokenizer.encode(f" {number}", continuation=True))


@torch.inference_mode()
def score(model: Transformer, prompt: Prompt) -> tuple[bool, float]:
    """Whether greedy decoding would give the answer, and the mean loss of its tokens in nats."""
    device = model.embedding.weight.device
    answer_A = torch.tensor(prompt.answer, device=device)

    def head(h_BTD: Tensor, output: Linear) -> Tensor:
        logits_AV: Tensor = output(h_BTD[0, -len(prompt.answer) :]).float()
        return logits_AV

    ids_BT = torch.tensor([prompt.ids + prompt.answer[:-1]], device=device)
    logits_AV = model(ids_BT, head=head)
    nats = F.cross_entropy(logits_AV, answer_A).item()
    return bool((logits_AV.argmax(-1) == answer_A).all()), nats


def _draw(figure: object, rows: Sequence[tuple[float, Sequence[Cell]]], lengths: Sequence[int]) -> None:
    axes = figure.subplots()  # type: ignore[attr-defined]
    shares = [[cell.recall for cell in row] for _, row in rows]
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(len(rows)), [f"{depth:.0%}" for depth, _ in rows])
    axes.set(xlabel="length of the text, in tokens", ylabel="depth of the needle")
    for y, row in enumerate(shares):
        for x, share in enumerate(row):
            axes.text(x, y, f"{share:.0%}", ha="center", va="center", color="black")
    axes.figure.colorbar(image, label="found")
