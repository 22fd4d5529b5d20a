"""`puna chat`: talk to a model in the terminal, or through a pipe."""

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from rich.markup import escape

from puna.infer.engine import Engine
from puna.infer.load import EngineConfig, load_engine
from puna.infer.sampling import SamplingParams
from puna.runtime.errors import InputError
from puna.runtime.files import write_json
from puna.runtime.progress import console
from puna.runtime.seeds import derive_seed
from puna.tokenizer.chat import render_chat

HELP = """\
/help          this list
/clear         forget the conversation
/system TEXT   replace the system prompt; without TEXT remove it
/retry         answer the last message again
/save FILE     write the conversation as JSON
/quit          leave, as Ctrl-D does
Ctrl-C stops an answer."""


@dataclass(frozen=True)
class ChatConfig:
    """Whom to talk to, and how it answers."""

    model: Path
    """Model directory; its tokenizer needs a chat template."""
    system: str | None = None
    """System prompt; none where absent."""
    temperature: float = 0.7
    """0 always takes the likeliest token; 1 follows the model's own probabilities."""
    top_p: float = 0.95
    """Choose among the fewest, likeliest tokens whose probabilities sum to at least this; 1 keeps all."""
    max_tokens: int | None = None
    """Longest answer in tokens; absent is as long as the context allows."""
    seed: int | None = None
    """Makes the answers repeatable; fresh ones where absent."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """Where it computes."""

    def __post_init__(self) -> None:
        self.sampling(0)

    def sampling(self, turn: int) -> SamplingParams:
        """Parameters of the answer that is the `turn`-th of a session."""
        seed = None if self.seed is None else derive_seed(self.seed, turn)
        return SamplingParams(self.max_tokens, self.temperature, top_p=self.top_p, seed=seed)


def main(config: ChatConfig) -> None:
    """Talk until the input ends: a line is a message, or a command that starts with a slash.

    In a terminal the answers appear as they grow. Where standard input is none, standard output carries the answers
    alone, one after the other, for scripts.

    Raises:
        InputError: the model cannot be loaded or has no chat template; in a script also a failed command, or a
            conversation that has outgrown the context.
    """
    engine = load_engine(config.model, config.engine)
    if engine.tokenizer.chat_template is None:
        raise InputError(
            f"{config.model} has no chat template, so nothing says how a conversation is written down for this "
            "model. It may be a base model: use `puna generate` to have it continue a text."
        )
    chat = Chat(engine, config)
    if sys.stdin.isatty():
        _talk(chat, config.model.name)
        return
    for line in sys.stdin:
        if not chat.take(line.strip()):
            return


def _talk(chat: "Chat", name: str) -> None:
    with suppress(ImportError):
        import readline  # noqa: F401  (gives `input` a history and editing keys)
    console.print(f"[bold]{escape(name)}[/bold]  [dim]/help lists the commands, Ctrl-D leaves[/dim]")
    while True:
        try:
            if not chat.take(input("> ").strip()):
                return
        except KeyboardInterrupt:
            console.print("\n[dim]Ctrl-D leaves.[/dim]")
        except EOFError:
            console.print()
            return
        except InputError as error:
            console.print(f"[red]{escape(str(error))}[/red]")


class Chat:
    """A conversation and the commands that change it.

    Attributes:
        messages: role and content of each, the system prompt first where there is one.
    """

    def __init__(self, engine: Engine, config: ChatConfig) -> None:
        self.messages: list[dict[str, str]] = []
        self._engine = engine
        self._config = config
        self._num_answers = 0
        self._set_system(config.system or "")

    def take(self, line: str) -> bool:
        """Act on a line of input; False means that the user leaves.

        Raises:
            InputError: an unknown or impossible command, or a conversation that has outgrown the context; the
                conversation is as before.
        """
        name, _, argument = line.partition(" ")
        if name == "/quit":
            return False
        if name.startswith("/"):
            self._command(name, argument.strip())
        elif line:
            self._answer([*self.messages, {"role": "user", "content": line}])
        return True

    def _command(self, name: str, argument: str) -> None:
        commands: dict[str, Callable[[], None]] = {
            "/help": lambda: console.print(HELP, style="dim", markup=False),
            "/clear": self._clear,
            "/system": lambda: self._set_system(argument),
            "/retry": self._retry,
            "/save": lambda: self._save(argument),
        }
        if name not in commands:
            raise InputError(f"There is no command {name}. There are {', '.join(commands)} and /quit.")
        commands[name]()

    def _clear(self) -> None:
        self.messages = [message for message in self.messages if message["role"] == "system"]

    def _set_system(self, text: str) -> None:
        rest = [message for message in self.messages if message["role"] != "system"]
        self.messages = [{"role": "system", "content": text}, *rest] if text else rest

    def _retry(self) -> None:
        if not self.messages or self.messages[-1]["role"] != "assistant":
            raise InputError("There is no answer yet that could be tried again.")
        self._answer(self.messages[:-1])

    def _save(self, file: str) -> None:
        if not file:
            raise InputError("/save needs the name of a file, such as /save talk.json.")
        try:
            write_json(Path(file), {"messages": self.messages})
        except OSError as error:
            raise InputError(f"The conversation cannot be saved: {error}.") from error
        console.print(f"Saved to {file}.", style="dim", markup=False)

    def _answer(self, messages: list[dict[str, str]]) -> None:
        """Print the assistant's turn as it grows, and take it into the conversation."""
        prompt_ids = render_chat(self._engine.tokenizer, messages, add_generation_prompt=True).ids
        sampling = self._config.sampling(self._num_answers)
        try:
            deltas = self._engine.stream(prompt_ids, sampling, new_text=True)
        except InputError as error:
            raise InputError(f"{error} /clear starts afresh.") from error
        self._num_answers += 1
        answer, num_tokens, started = "", 0, time.monotonic()
        with closing(deltas), _ctrl_c() as pressed:
            for delta in deltas:
                print(delta.text, end="", flush=True)
                answer += delta.text
                num_tokens += len(delta.ids)
                if pressed():
                    break
        seconds = time.monotonic() - started
        print(flush=True)
        console.print(f"{num_tokens} tokens, {num_tokens / seconds:.0f} tokens/s", style="dim")
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        if pressed() and not sys.stdin.isatty():
            raise KeyboardInterrupt  # what runs unattended ends altogether


@contextmanager
def _ctrl_c() -> Iterator[Callable[[], bool]]:
    """Note Ctrl-C instead of raising KeyboardInterrupt, which could strike in the middle of a step."""
    times = 0

    def note(number: int, frame: object) -> None:
        nonlocal times
        times += 1

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: times > 0
    finally:
        signal.signal(signal.SIGINT, before)
