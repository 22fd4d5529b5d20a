"""`puna align collect`: people say which of two answers they prefer, for the next round to learn from."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from puna.batches.preferences import STRENGTHS
from puna.config import to_plain
from puna.evaluate.rating.answers import Question, compare_two, read_questions
from puna.evaluate.rating.ask import AskConfig, ask, inputs_of, open_answers, open_page
from puna.evaluate.rating.records import Rating
from puna.runtime.files import write_jsonl
from puna.runtime.manifest import Manifest
from puna.runtime.progress import say


@dataclass(frozen=True, kw_only=True)
class CollectConfig(AskConfig):
    """Which answers people compare, and where. `output` gets preferences.jsonl, which `puna reward` and `puna align`
    read, ties.jsonl and both_bad.jsonl, and what a rating session keeps."""

    samples: int = 4
    """Answers that each model draws for a prompt, at each temperature; two different whole ones are compared, of two
    models where there are two."""
    temperatures: tuple[float, ...] = (1.0,)
    """How freely they are drawn."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.answers is None and self.prompts is None:
            raise ValueError("prompts says what the models are to answer; set it.")
        if self.samples < 1 or not self.temperatures or min(self.temperatures) <= 0:
            raise ValueError("samples has to be at least 1, and temperatures need at least one, each above 0.")
        if self.sampling.temperature != 1.0:
            raise ValueError("Set temperatures instead of sampling.temperature.")


def main(config: CollectConfig) -> None:
    """Draw answers, have them rated until Ctrl-C, and write the preferences.

    Raises:
        InputError: a model, the prompts or the answers are wrong; or there is nothing to compare.
        KeyboardInterrupt: it was stopped before everything had been rated; what had been is written.
    """
    with closing(open_page(config)) as listener:
        answered = open_answers(
            config, lambda: _questions(config), samples=config.samples, temperatures=config.temperatures, whole=True
        )
        comparisons, missing = compare_two(answered, config.seed)
        if missing:
            say(f"{missing:,} of {len(answered):,} prompts are left out: they have no two different whole answers.")
        session = ask(config, comparisons, listener)
    _write(config, session.log.ratings, session.num_finished, missing)
    if session.num_finished < session.num_comparisons:
        raise KeyboardInterrupt


def _questions(config: CollectConfig) -> list[Question]:
    assert config.prompts is not None
    return read_questions(config.prompts, config.max_prompts)


def _write(config: CollectConfig, ratings: Sequence[Rating], num_finished: int, missing: int) -> None:
    """The outputs, each whole; made anew from all ratings."""
    kept: dict[str, list[dict[str, Any]]] = {"preferences": [], "ties": [], "both_bad": []}
    for rating in ratings:
        kind = "both_bad" if rating.verdict == "both_bad" else "ties" if rating.better is None else "preferences"
        kept[kind].append(to_preference_row(rating) if kind == "preferences" else _to_row(rating))
    for kind, rows in kept.items():
        write_jsonl(config.output / f"{kind}.jsonl", rows)
    results: dict[str, Any] = {
        "num_ratings": len(ratings),
        "num_comparisons_finished": num_finished,
        "num_prompts_left_out": missing,
        "num_raters": len({rating.rater for rating in ratings}),
        **{f"num_{kind}": len(rows) for kind, rows in kept.items()},
        "num_edited": sum(rating.edited is not None for rating in ratings),
        "num_unsafe_answers": sum(rating.left_unsafe + rating.right_unsafe for rating in ratings),
    }
    from puna.evaluate.rating.agreement import agreement  # imports scipy, which takes a second

    found = agreement(ratings)
    if found is not None:
        results |= found.as_results()
        say(str(found))
    Manifest("collect", to_plain(config), inputs_of(config), results).write(config.output)
    say(
        f"Wrote {len(kept['preferences']):,} preferences to {config.output / 'preferences.jsonl'}; beside it are "
        f"{len(kept['ties']):,} ties, and {len(kept['both_bad']):,} comparisons of which both are bad."
    )


def to_preference_row(rating: Rating) -> dict[str, Any]:
    """A rating as a row that `puna.batches.preferences` reads.

    `strength` is how much better the best answer is than the next. Of an edited answer nobody has said that; then how
    much better the chosen answer is than the rejected one stands in `strength_of_chosen`.
    """
    assert rating.better is not None
    sides = ("left", "right") if rating.better == "left" else ("right", "left")
    chosen, rejected = (getattr(rating, f"{side}_answer") for side in sides)
    strength = STRENGTHS[abs(int(rating.verdict)) - 1]
    return {
        "id": rating.item,
        "prompt": rating.prompt,
        "chosen": chosen,
        "rejected": rejected,
        **(
            {"strength": strength}
            if rating.edited is None
            else {"edited": rating.edited, "strength_of_chosen": strength}
        ),
        "rater": rating.rater,
        "models": {"chosen": getattr(rating, sides[0]), "rejected": getattr(rating, sides[1])},
        **_unsafe(rating, {"chosen": sides[0], "rejected": sides[1]}),
        "category": rating.category,
    }


def _to_row(rating: Rating) -> dict[str, Any]:
    return {
        "id": rating.item,
        "prompt": rating.prompt,
        "answers": [rating.left_answer, rating.right_answer],
        "rater": rating.rater,
        "models": [rating.left, rating.right],
        **_unsafe(rating, {"left": "left", "right": "right"}),
        "category": rating.category,
    }


def _unsafe(rating: Rating, sides: dict[str, str]) -> dict[str, Any]:
    """Which of the answers the rater finds unsafe, where there are any."""
    found = [name for name, side in sides.items() if getattr(rating, f"{side}_unsafe")]
    return {"unsafe": found} if found else {}
