"""`puna search`: try settings of a fine-tuning recipe, and write the best one down."""

import os
from typing import TYPE_CHECKING

from puna.config import render_values
from puna.finetune.search.config import SearchConfig
from puna.runtime.errors import InputError
from puna.runtime.files import write_text
from puna.runtime.progress import progress, say

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

__all__ = ["SearchConfig", "main"]


def main(config: SearchConfig) -> None:
    """Run the trials that are wanting, write best.toml and search.html after each, and print the best.

    Raises:
        InputError: the recipe, a parameter or an input is wrong, or the output holds another search; optuna is absent.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("puna search starts its processes itself; run it without torchrun, and set workers.")
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise InputError("Searching needs optuna: pip install 'puna[search]'.") from error
    from puna.finetune.search.show import print_search, write_search_page
    from puna.finetune.search.study import Search

    search = Search(config)
    if before := len(search.finished):
        say(f"Going on after {before} trials.")
    with progress("Searching", total=max(config.trials, before)) as advance:
        advance(before)

        def told(trial: "FrozenTrial") -> None:
            best, recipe = search.best, search.best_recipe()
            if best is not None and recipe is not None:
                heading = f"# Trial {best.number} of puna search: {config.metric} {best.value:.6g}\n\n"
                write_text(config.output / "best.toml", heading + render_values(recipe))
            write_search_page(search)
            advance(1, "none has run to its end" if best is None else f"best {config.metric} {best.value:.4f}")

        search.run(told)
    print_search(search)
