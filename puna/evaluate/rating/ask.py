"""Have people rate answers: draw them, serve the page, keep what is said."""

import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console

from puna.config import to_plain
from puna.evaluate.rating.answers import Answered, Question, draw, keep_answers, read_answers
from puna.evaluate.rating.records import RatingLog
from puna.evaluate.rating.session import Comparison, Session, arrange
from puna.infer.config import EngineConfig
from puna.infer.sampling import SamplingParams
from puna.runtime.errors import InputError
from puna.runtime.files import only_process
from puna.runtime.listen import address_of, check_port, listen
from puna.runtime.manifest import content_hash
from puna.runtime.progress import progress, say

RATINGS_FILE = "ratings.jsonl"


@dataclass(frozen=True, kw_only=True)
class AskConfig:
    """Whose answers are rated, by how many people, and where."""

    output: Path
    """Gets answers/, and ratings.jsonl, which grows by a line with every rating."""
    models: dict[str, Path] = field(default_factory=dict)
    """Model directories that answer: name -> directory. Raters never see the names."""
    prompts: Path | None = None
    """A file of prompts, or a folder of such files: a column "prompt", or conversations and preferences, of which the
    last answers are left out. A column "category" is kept."""
    answers: Path | None = None
    """Answers made elsewhere instead of models and prompts, JSON Lines: {"prompt": text or messages, "answers":
    [{"model": name, "text": answer}, ...]}, with "category" where there is one."""
    max_prompts: int = 0
    """Take at most so many prompts, from the first on; 0 takes all."""
    raters: int = 1
    """How many people have to rate what is shared, until all is done. More may come; each is shown what is left."""
    overlap: float = 0.1
    """Share of the comparisons that everybody is shown, to see how far raters agree; others are shown to one rater."""
    seed: int = 0
    """Of drawing answers, their sides and their order."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is every network interface. There are no keys: whoever can reach it can rate."""
    port: int = 8001
    """TCP port; 0 takes any free one."""
    sampling: SamplingParams = field(default_factory=lambda: SamplingParams(max_tokens=512))
    """How answers go on, and when they end; `seed` is that above."""
    engine: EngineConfig = field(default_factory=lambda: EngineConfig(max_rows=16))
    """Where the answering models compute."""

    def __post_init__(self) -> None:
        check_port(self.port)
        if self.raters < 1 or not 0 <= self.overlap <= 1 or self.max_prompts < 0:
            raise ValueError("raters has to be at least 1, overlap between 0 and 1, max_prompts not negative.")
        if self.sampling.seed is not None:
            raise ValueError("Set seed instead of sampling.seed.")
        if (self.answers is None) == (not self.models):
            raise ValueError("Answers come either from models or from a file: set one of models and answers.")
        if self.answers is not None and (self.prompts is not None or self.max_prompts):
            raise ValueError("answers has the prompts in it; leave prompts and max_prompts out.")


def open_answers(
    config: AskConfig,
    questions: Callable[[], Sequence[Question]],
    *,
    samples: int,
    temperatures: Sequence[float],
    whole: bool,
) -> list[Answered]:
    """The answers to rate: read, or drawn, or those drawn the last time.

    Args:
        questions: reads them, where answers are to be drawn.
        samples, temperatures, whole: see `puna.evaluate.rating.answers.draw`.

    Raises:
        InputError: see `draw`, `read_answers` and `keep_answers`.
    """
    if config.answers is not None:
        return read_answers(config.answers)
    plain = to_plain(config)
    settings = {name: plain[name] for name in ("models", "prompts", "max_prompts", "seed", "sampling")}
    settings |= {"samples": samples, "temperatures": list(temperatures), "whole": whole}
    return keep_answers(
        config.output / "answers",
        settings,
        inputs_of(config),
        lambda drawn: draw(
            config.models,
            questions(),
            samples=samples,
            temperatures=temperatures,
            sampling=config.sampling,
            engine=config.engine,
            seed=config.seed,
            whole=whole,
            drawn=drawn,
        ),
    )


def inputs_of(config: AskConfig) -> dict[str, str]:
    """Paths of what the answers come from, and their hashes."""
    paths = [*config.models.values(), config.prompts, config.answers]
    return {str(path): content_hash(path) for path in paths if path is not None}


def open_page(config: AskConfig) -> socket.socket:
    """The socket that raters will come to, had before anything slow begins; who comes too early waits.

    Raises:
        InputError: the address is not to be had, or the packages for serving are not installed.
    """
    for package in ("fastapi", "uvicorn"):
        if find_spec(package) is None:
            raise InputError(f"The rating page needs the package {package}: pip install 'puna[serve]'.")
    return listen(config.host, config.port)


def ask(config: AskConfig, comparisons: Sequence[Comparison], listener: socket.socket) -> Session:
    """Serve the rating page until Ctrl-C, and return what was rated; at once, if everything has been.

    Args:
        listener: from `open_page`.

    Raises:
        InputError: there is nothing to compare, ratings of other comparisons are there, or another process asks too.
    """
    from puna.evaluate.rating.app import build_app, build_server

    if not comparisons:
        raise InputError("There is nothing to compare: no prompt has two different answers.")
    with only_process(config.output, "rating session"):
        log = RatingLog(config.output / RATINGS_FILE)
        arranged = arrange(comparisons, config.overlap, config.seed)
        session = Session(arranged, log, raters=config.raters, seed=config.seed)
        shown, total = session.num_finished, session.num_comparisons
        if shown == total:
            say(f"All {total:,} comparisons have been rated.")
            return session
        _announce(address_of(listener), session)
        with progress("Rated", total=total, every_seconds=0) as advance:
            advance(shown)

            def changed() -> None:
                nonlocal shown
                before, shown = shown, session.num_finished
                if shown != before:
                    advance(shown - before)
                    if shown == total:
                        say("Everything has been rated; Ctrl-C ends.")

            with suppress(KeyboardInterrupt):
                build_server(build_app(session, changed)).run(sockets=[listener])
    return session


def _announce(address: str, session: Session) -> None:
    left = session.num_comparisons - session.num_finished
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(
        f"Rate at {address} ({left:,} of {session.num_comparisons:,} comparisons are left). Every rating is kept at "
        "once; Ctrl-C stops, and the same command goes on."
    )
