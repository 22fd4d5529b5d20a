"""The settings of `puna finetune`."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from puna.batches.conversations import FormName
from puna.config import Kinds
from puna.finetune.regularize.config import EARLIER_LOSS, EarlierConfig, RegularizationConfig
from puna.finetune.selection import SelectionConfig
from puna.finetune.tasks.task import Task, TaskData
from puna.finetune.text.task import TextTask
from puna.peft.methods import AnyMethod
from puna.train.config import TrainConfig

HEAD_TASKS = {
    "classification": "puna.finetune.tasks.classification:Classification",
    "tagging": "puna.finetune.tasks.tagging:Tagging",
    "spans": "puna.finetune.tasks.spans:Spans",
    "relations": "puna.finetune.tasks.relations:Relations",
}
"""Kind of a task with a head -> its class."""

TASKS = HEAD_TASKS | {
    "translation": "puna.finetune.text.translation:Translation",
    "summarisation": "puna.finetune.text.summarisation:Summarisation",
    "dialogue": "puna.finetune.text.dialogue:Dialogue",
    "code": "puna.finetune.text.code:Code",
    "control": "puna.finetune.text.control:Control",
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
class NamedTask:
    """One of several tasks that share a trunk."""

    name: str
    """What its curves and its directory are called."""
    task: Annotated[Task, Kinds("task", HEAD_TASKS)]
    """What is learnt, with a head of its own."""
    data: TaskData
    """What it is learnt from."""
    weight: float = 1.0
    """Factor of its loss, in which every example counts the same."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.-]+", self.name) or self.name.startswith("."):
            raise ValueError(f"A task is called {self.name!r}; its directory is too, so use letters, digits, - and _.")
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
    task: Annotated[Task | TextTask | None, Kinds("task", TASKS)] = None
    """What the model learns from `data`: with a head in place of the next token, or by writing texts."""
    data: TaskData | None = None
    """What a task is learnt from."""
    tasks: tuple[NamedTask, ...] = ()
    """Several tasks with heads at once, in place of `task` and `data`; each becomes a directory model/NAME."""
    tasks_temperature: float = 1.0
    """Shares of the rows are in proportion to a task's examples ** (1 / tasks_temperature): 1 is as they are, larger
    values bring small tasks up (Raffel et al. 2020, arXiv:1910.10683, section 3.5.2)."""
    peft: AnyMethod = None
    """Train by a method that leaves most parameters as they are, instead of all: `{ kind = "lora", rank = 16 }`. What
    it puts beside the model's parameters becomes adapter/, a directory that PEFT reads where it has the method;
    adapters of a task with a head are merged into its model/ where that is possible."""
    selection: SelectionConfig | None = None
    """Keep the best model by a metric instead of the last, and end early."""
    regularization: RegularizationConfig | None = None
    """Against over-fitting, and against forgetting."""
    earlier: EarlierConfig | None = None
    """What the model has learnt before, and should not forget."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights in the finished model directory."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The training run. For a task, a row is one example and `row_length` the tokens that it may have."""

    @property
    def earlier_metrics(self) -> tuple[str, ...]:
        """Names of the curves of what is measured on earlier data."""
        return (EARLIER_LOSS,) if self.earlier is not None and self.earlier.held_out is not None else ()

    @property
    def task_data(self) -> tuple[TaskData, ...]:
        """What the task, or each of the tasks, is learnt from."""
        return (self.data,) if self.data is not None else tuple(each.data for each in self.tasks)

    def __post_init__(self) -> None:
        given = [self.conversations is not None, bool(self.mixture), self.task is not None, bool(self.tasks)]
        if sum(given) != 1:
            raise ValueError("Set one of conversations, mixture, task and tasks: what is to be learnt.")
        if (self.task is None) != (self.data is None):
            raise ValueError("A task needs data, with the file to train on (data.train), and data needs a task.")
        _check_tasks(self)
        if self.task is not None or self.tasks:
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
        if self.regularization is not None:
            _check_regularization(self.regularization, self)
        names = [source.name for source in self.mixture]
        if len(set(names)) < len(names):
            raise ValueError(f"Two sources of the mixture have the same name ({', '.join(names)}).")
        if self.neftune_alpha < 0 or self.sample_tokens < 1:
            raise ValueError("neftune_alpha cannot be negative, and sample_tokens has to be at least 1.")


def _check_tasks(config: FinetuneConfig) -> None:
    names = [each.name for each in config.tasks]
    if len(set(names)) < len(names):
        raise ValueError(f"Two of the tasks have the same name ({', '.join(names)}).")
    if len({each.task.attention for each in config.tasks}) > 1:
        looks = ", ".join(f"{each.name} {each.task.attention}" for each in config.tasks)
        raise ValueError(f"Tasks on one trunk have to look the same ways, but they are {looks}; set task.attention.")
    if not config.tasks_temperature > 0:
        raise ValueError(f"tasks_temperature is {config.tasks_temperature}; it has to be above 0.")


def _check_regularization(regularization: RegularizationConfig, config: FinetuneConfig) -> None:
    ewc = regularization.ewc
    if ewc is not None and ewc.fisher is None and (config.earlier is None or config.earlier.train is None):
        raise ValueError("regularization.ewc needs ewc.fisher, or earlier.train to estimate it on.")
    differs = regularization.drops or config.neftune_alpha or getattr(config.peft, "dropout", 0)
    if regularization.rdrop and not differs:
        raise ValueError(
            "regularization.rdrop compares two passes under dropout: set residual_dropout, embedding_dropout, or the "
            "dropout of peft."
        )
    if regularization.drops and config.train.compile:
        raise ValueError("Dropout is drawn row by row, which train.compile cannot compile; leave one of them out.")
    checkpointing = config.train.parallel.activation_checkpointing != "none"
    if regularization.residual_dropout and checkpointing and config.earlier is not None and config.earlier.replay_share:
        raise ValueError(
            "With earlier.replay_share, residual_dropout and activation checkpointing do not go together: what a layer "
            "drops is not known any more when it is computed again."
        )
    if regularization.fisher_rows and config.tasks:
        raise ValueError("regularization.fisher_rows is for one task, beside whose model it is written.")
    if regularization.fisher_rows and config.peft is not None:
        raise ValueError(
            "regularization.fisher_rows is about the model's own parameters, and with peft others are trained; leave "
            "one of them out."
        )
