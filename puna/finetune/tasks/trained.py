"""What a head was trained to do, as the directory that it was written to tells."""

from pathlib import Path

from puna.config import Kinds, parse_config
from puna.finetune.config import HEAD_TASKS
from puna.finetune.tasks.task import Task
from puna.peft.heads import HeadModel
from puna.runtime.errors import InputError
from puna.runtime.manifest import FILE_NAME, Manifest

_BY_ARCHITECTURE = {
    "ForSequenceClassification": "classification",
    "ForTokenClassification": "tagging",
    "ForQuestionAnswering": "spans",
}


def trained_task(head: HeadModel, directory: Path) -> tuple[Task, int]:
    """The task of a head, and the most tokens of a text that it was trained on. For a head from elsewhere, the kind of
    task with its usual settings, and the model's context.

    Raises:
        InputError: the manifest is of something else.
    """
    context = head.model.config.context_length
    kinds = Kinds("task", HEAD_TASKS)
    if not (directory / FILE_NAME).is_file():
        return kinds.load(_BY_ARCHITECTURE[head.spec.architecture])(), context
    values = Manifest.read(directory).config
    if not isinstance(values.get("task"), dict):
        raise InputError(f"{directory / FILE_NAME} does not say what the head in {directory} was trained to do.")
    source = str(directory / FILE_NAME)
    task: Task = parse_config(kinds.choose(values["task"], source), values["task"], source)
    return task, min(context, values["train"]["row_length"])
