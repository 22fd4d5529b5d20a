"""`puna generate`: prompts in, their continuations out."""

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from puna.infer.load import EngineConfig, load_engine
from puna.infer.request import Completion
from puna.infer.sampling import SamplingParams
from puna.runtime.errors import InputError
from puna.runtime.progress import progress


@dataclass(frozen=True)
class GenerateConfig:
    """What to generate. Prompts are continued as they are; for conversations there is `puna chat`."""

    model: Path
    """Model directory."""
    prompt: str | None = None
    """One prompt. With neither this nor `prompts`, each line of standard input is a prompt."""
    prompts: Path | None = None
    """File of prompts: .jsonl holds one JSON string or object with "prompt" a line, any other file a prompt a line."""
    json: bool = False
    """Print one JSON object a line (prompt, text, ids, finish_reason, ...) instead of prompt and text."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    """How the texts go on, and when they end."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """Where it computes."""

    def __post_init__(self) -> None:
        if self.prompt is not None and self.prompts is not None:
            raise InputError("prompt and prompts are both given; which of them is meant? Leave one out.")


def main(config: GenerateConfig) -> None:
    """Print the continuation of every prompt: of a single one as it grows, of several when all are done.

    Raises:
        InputError: no prompt, an unreadable file, or a model that cannot be loaded.
    """
    prompts = read_prompts(config)
    engine = load_engine(config.model, config.engine)
    ids = [engine.encode(prompt) for prompt in prompts]
    if len(prompts) == 1 and not config.json:
        print(prompts[0], end="", flush=True)
        for delta in engine.stream(ids[0], config.sampling):
            print(delta.text, end="", flush=True)
        print()
        return
    with progress("Generating", total=len(prompts)) as advance:
        completions = engine.generate(ids, config.sampling, finished=advance)
    for prompt, completion in zip(prompts, completions, strict=True):
        if config.json:
            print(json.dumps(_as_json(prompt, completion), ensure_ascii=False))
        else:
            print(f"{prompt}{completion.text}\n")
            if completion.error:
                print(f"The text above is not complete. {completion.error}", file=sys.stderr)


def read_prompts(config: GenerateConfig) -> list[str]:
    """The prompts that a configuration names.

    Raises:
        InputError: there are none, or the file cannot be read.
    """
    if config.prompt is not None:
        return [config.prompt]
    source = "standard input" if config.prompts is None else str(config.prompts)
    try:
        text = sys.stdin.read() if config.prompts is None else config.prompts.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"The prompts cannot be read: {error}.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{source} is not UTF-8 text, so it cannot hold prompts.") from error
    lines = [line for line in text.split("\n") if line.strip()]
    if not lines:
        raise InputError(f'There is no prompt in {source}. Give one with prompt = "...", or a file with prompts.')
    if config.prompts is not None and config.prompts.suffix == ".jsonl":
        return list(_parse_jsonl(lines, source))
    return lines


def _parse_jsonl(lines: list[str], source: str) -> Iterable[str]:
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line)
        except ValueError as error:
            raise InputError(f"{source}, prompt {number}, is not JSON: {error}.") from error
        prompt = value.get("prompt") if isinstance(value, dict) else value
        if not isinstance(prompt, str):
            raise InputError(
                f'{source}, prompt {number}: a line is a JSON string, or an object with a string under "prompt".'
            )
        yield prompt


def _as_json(prompt: str, completion: Completion) -> dict[str, Any]:
    line = {
        "prompt": prompt,
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "num_prompt_tokens": completion.num_prompt_tokens,
        "ids": completion.ids,
    }
    if completion.error:
        line["error"] = completion.error
    if completion.logprobs:
        line["logprobs"] = [asdict(token) for token in completion.logprobs]
    return line
