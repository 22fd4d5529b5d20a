"""Every task by its kind, and how a recipe names one."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from puna.config import Kinds, parse_config, read_toml, to_plain
from puna.evaluate.tasks.task import Task

TASKS = {
    "mmlu": "puna.evaluate.tasks.mmlu:Mmlu",
    "cmmlu": "puna.evaluate.tasks.cmmlu:Cmmlu",
    "hellaswag": "puna.evaluate.tasks.hellaswag:HellaSwag",
    "piqa": "puna.evaluate.tasks.piqa:Piqa",
    "winogrande": "puna.evaluate.tasks.winogrande:WinoGrande",
    "copa": "puna.evaluate.tasks.copa:Copa",
    "lambada": "puna.evaluate.tasks.lambada:Lambada",
    "needle": "puna.evaluate.tasks.needle:Needle",
    "perplexity": "puna.evaluate.tasks.perplexity:Perplexity",
    "gsm8k": "puna.evaluate.tasks.gsm8k:Gsm8k",
    "math": "puna.evaluate.tasks.hendrycks_math:HendrycksMath",
    "triviaqa": "puna.evaluate.tasks.triviaqa:TriviaQa",
    "mbpp": "puna.evaluate.tasks.mbpp:Mbpp",
    "simple_safety_tests": "puna.evaluate.tasks.refusal:SimpleSafetyTests",
    "over_refusal": "puna.evaluate.tasks.refusal:OverRefusal",
    "mt_bench": "puna.evaluate.tasks.mt_bench:MtBench",
    "mt_bench_pairs": "puna.evaluate.tasks.mt_bench:MtBenchPairs",
    "choice": "puna.evaluate.tasks.custom:CustomChoice",
    "continuation": "puna.evaluate.tasks.custom:CustomContinuation",
    "generation": "puna.evaluate.tasks.custom_generation:CustomGeneration",
}
"""Kind -> "module:Class"."""


class TaskKinds(Kinds):
    """A task is named by its kind, by a table with its kind and settings, or by a TOML file with such a table."""

    def read(self, value: str | Mapping[str, Any]) -> Task:
        """The task.

        Raises:
            InputError: there is no such task or file, or a setting is wrong.
        """
        if not isinstance(value, str):
            return self.parse(value, "a task")
        if not value.endswith(".toml"):
            return self.parse({"kind": value}, "a task")
        path = Path(value)
        values = read_toml(path)
        for key in ("file", "shots_file"):
            if isinstance(values.get(key), str):
                values[key] = str(path.parent / values[key])
        return self.parse({"name": path.stem} | values, value)

    def parse(self, values: Mapping[str, Any], source: str) -> Task:
        """The task that a table asks for; `source` names the table in errors."""
        task: Task = parse_config(self.choose(values, source), values, source=source)
        return task

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """How pydantic reads and writes a task."""
        from pydantic_core import core_schema

        def read(value: Any) -> Task:
            if not isinstance(value, str | Mapping):
                raise ValueError(f"is {json.dumps(value)}, but has to be a kind, a .toml file, or a table with a kind.")
            return self.read(value)

        write = core_schema.plain_serializer_function_ser_schema(to_plain)
        return core_schema.no_info_plain_validator_function(read, serialization=write)


AnyTask = Annotated[Task, TaskKinds("task", TASKS)]
