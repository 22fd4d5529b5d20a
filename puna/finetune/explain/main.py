"""`puna explain`: what a head's answer rests on, or how sure a model is of each token that it writes."""

from dataclasses import dataclass
from pathlib import Path

import torch

from puna.finetune.explain.generation import GenerationSettings, explain_generation
from puna.finetune.explain.heads import HeadSettings, explain_head
from puna.finetune.explain.show import show_generation, show_head
from puna.finetune.explain.texts import Texts, read_texts
from puna.finetune.tasks.trained import trained_task
from puna.infer.generate import GenerateConfig, read_prompts
from puna.infer.load import load_engine
from puna.peft.files import CONFIG_FILE as ADAPTER_FILE
from puna.peft.heads import load_head_model
from puna.runtime.devices import open_device
from puna.runtime.errors import InputError
from puna.runtime.files import read_json
from puna.runtime.progress import progress, say
from puna.weights.huggingface import CONFIG_FILE
from puna.weights.load import resolve


@dataclass(frozen=True)
class ExplainConfig:
    """Show which words a head's answer rests on; of a model without a head, how sure it is of each token it writes."""

    model: Path
    """A directory with a head for classes, relations or tags (model/ or adapter/, as `puna finetune` writes them), or
    of any model that writes."""
    output: Path = Path("explanation.html")
    """The page to write."""
    text: str | None = None
    """One text: what the head reads, or what the model goes on from."""
    second_text: str | None = None
    """The other text of a pair, for a head that reads pairs."""
    data: Path | None = None
    """Several texts: a .txt file with one a line; for a head also a file in the form of the task's own data, with or
    without labels; for a model that writes also JSON Lines with "prompt"."""
    columns: tuple[str, ...] = ()
    """Names of the columns of a .csv or .tsv file that has no header."""
    max_texts: int = 20
    """Explain at most so many."""
    head: HeadSettings | None = None
    """How a head's answers are explained."""
    generation: GenerationSettings | None = None
    """How a text is written that is then explained."""

    def __post_init__(self) -> None:
        if (self.text is None) == (self.data is None):
            raise ValueError("Set one of text and data: what is to be explained.")
        if self.second_text is not None and self.text is None:
            raise ValueError("second_text needs text, the first of the pair.")
        if self.columns and self.data is None:
            raise ValueError("columns are those of data.")
        if self.max_texts < 1:
            raise ValueError(f"max_texts is {self.max_texts}; it has to be at least 1.")


def main(config: ExplainConfig) -> None:
    """Explain every text, write the page, and print the figures.

    Raises:
        InputError: the model cannot be read or explained, a text cannot be read, or settings are for the other kind of
            model.
    """
    directory = resolve(config.model)
    values = read_json(directory / CONFIG_FILE) if (directory / CONFIG_FILE).is_file() else {}
    if not values and (directory / ADAPTER_FILE).is_file():
        raise InputError(
            f"{config.model} holds an adapter of a model that writes. Name that model in its place, and the adapter by "
            f"--set generation.engine.adapters.mine={config.model} --set generation.sampling.adapter=mine."
        )
    architecture = str((values.get("architectures") or [""])[0])
    if architecture.endswith("ForCausalLM") or not architecture:
        _explain_generation(config)
    else:
        _explain_head(config, directory)
    say(f"Page: {config.output}")


def _explain_head(config: ExplainConfig, directory: Path) -> None:
    if config.generation is not None:
        raise InputError(f"{config.model} has a head, and writes no text: leave generation out.")
    settings = config.head or HeadSettings()
    loaded = load_head_model(directory, dtype=torch.float32)
    task, max_tokens = trained_task(loaded, directory)
    given = tuple(text for text in (config.text, config.second_text) if text is not None)
    texts = Texts(given, config.data, config.columns, config.max_texts)
    asked = read_texts(texts, task, loaded.tokenizer, max_tokens)
    model = loaded.model.to(open_device(settings.device))
    explanations = []
    with progress("Explaining", total=len(asked)) as advance:
        for each in asked:
            explanations.append(explain_head(model, loaded.tokenizer, loaded.spec, loaded.attention, each, settings))
            advance()
    show_head(explanations, loaded.spec, loaded.attention, settings, model=config.model, destination=config.output)


def _explain_generation(config: ExplainConfig) -> None:
    if config.head is not None or config.second_text is not None or config.columns:
        raise InputError(f"{config.model} has no head: leave head, second_text and columns out.")
    settings = config.generation or GenerationSettings()
    prompts = read_prompts(GenerateConfig(config.model, prompt=config.text, prompts=config.data))
    if len(prompts) > config.max_texts:
        say(f"{config.data} holds {len(prompts)} texts; the first {config.max_texts} are explained.")
        prompts = prompts[: config.max_texts]
    engine = load_engine(config.model, settings.engine)
    explanations = explain_generation(engine, prompts, settings)
    show_generation(explanations, prompts, settings, model=config.model, destination=config.output)
