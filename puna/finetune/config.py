"""The settings of `puna finetune`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from puna.batches.conversations import FormName
from puna.config import Kinds
from puna.finetune.selection import SelectionConfig
from puna.finetune.tasks.task import Task, TaskData
from puna.peft.lora import LoRAConfig
from puna.runtime.errors import InputError
from puna.train.config import TrainConfig

TASKS = {
    "classification": "puna.finetune.tasks.classification:Classification",
    "tagging": "puna.finetune.tasks.tagging:Tagging",
    "spans": "puna.finetune.tasks.spans:Spans",
}
"""Kind of a task -> its class."""


@dataclass(frozen=True, kw_only=True)
class ConversationSource:
    """One ingredient of a mixture."""

    name: str
    """What it is called in reports."""
    conversations: Path
    """Conversations, as in `conversations` above."""
    form: FormName = "detect"
    """How they are written."""
    weight: float = 1.0
    """Share of the rows; only the ratio to the other sources' matters."""

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ValueError(f"The weight of {self.name} is {self.weight}; it has to be above 0.")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Teach a pretrained model to answer (conversations), or put a head on it (task) that classifies, tags or finds."""

    model: Path
    """Model directory to start from."""
    output: Path
    """Gets model/ (the finished model directory) or adapter/, tokens/, checkpoints/, metrics.jsonl and tensorboard/."""
    conversations: Path | None = None
    """A file of conversations, or a folder of such files: JSON, JSON Lines, CSV, TSV or Parquet. Only the assistant's
    tokens carry loss."""
    form: FormName = "detect"
    """How conversations are written: OpenAI's `messages`, `sharegpt`, `alpaca`, `prompt_completion`; or to be seen by
    each row's columns."""
    mixture: tuple[ConversationSource, ...] = ()
    """Several sources in proportions of your choice, in place of `conversations`."""
    held_out_conversations: Path | None = None
    """Conversations to measure the loss on."""
    chat_template: Literal["keep", "llama2", "llama3", "chatml"] = "keep"
    """The model's own chat template, or a built-in one whose special tokens its tokenizer has."""
    neftune_alpha: float = 0.0
    """Noise on the embeddings (NEFTune, arXiv:2310.05914), which makes answers fuller; 5 is a good value, 0 is none."""
    sample_prompts: tuple[str, ...] = ()
    """Questions that the model answers greedily at every validation, into samples/."""
    sample_tokens: int = 64
    """The most tokens in such an answer."""
    task: Annotated[Task | None, Kinds("task", TASKS)] = None
    """A head in place of the next token, and what it learns from `data`."""
    data: TaskData | None = None
    """What a task is learnt from."""
    peft: LoRAConfig | None = None
    """Train low-rank adapters instead of all parameters. Conversations give adapter/, a directory that PEFT reads; a
    task's adapters are merged into its model."""
    selection: SelectionConfig | None = None
    """Keep the best model by a metric instead of the last, and end early."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights in the finished model directory."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The training run. For a task, a row is one example and `row_length` the tokens that it may have."""

    def __post_init__(self) -> None:
        given = [self.conversations is not None, bool(self.mixture), self.task is not None]
        if sum(given) != 1:
            raise ValueError("Set one of conversations, mixture and task: what is to be learnt.")
        if (self.task is None) != (self.data is None):
            raise ValueError("A task needs data, with the file to train on (data.train), and data needs a task.")
        if self.task is not None:
            unused = [
                self.held_out_conversations,
                self.neftune_alpha,
                self.sample_prompts,
                self.chat_template != "keep",
            ]
            if any(unused) or self.form != "detect":
                raise ValueError(
                    "held_out_conversations, form, chat_template, neftune_alpha and sample_prompts are for "
                    "conversations; a task has data.held_out."
                )
        if self.selection is not None and not self.train.validate_every:
            raise ValueError("selection chooses among validations: set train.validate_every.")
        names = [source.name for source in self.mixture]
        if len(set(names)) < len(names):
            raise ValueError(f"Two sources of the mixture have the same name ({', '.join(names)}).")
        if self.neftune_alpha < 0 or self.sample_tokens < 1:
            raise ValueError("neftune_alpha cannot be negative, and sample_tokens has to be at least 1.")


def check_row_length(config: FinetuneConfig, context_length: int) -> None:
    """Refuse rows that the model has no positions for.

    Raises:
        InputError: they are longer than its context.
    """
    if config.train.row_length > context_length:
        raise InputError(
            f"train.row_length ({config.train.row_length:,}) is longer than the model's context ({context_length:,})."
        )
