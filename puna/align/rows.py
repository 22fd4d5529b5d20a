"""What every training on preferences opens first."""

from pathlib import Path

from puna.batches.preference_rows import PreferenceRows, write_preference_shards
from puna.batches.preferences import read_preferences, with_mismatched
from puna.batches.shards import TokenShards
from puna.parallel.mesh import is_first_process, wait_for_all
from puna.tokenizer.base import Tokenizer


def open_rows(
    path: Path,
    destination: Path,
    *,
    tokenizer: Tokenizer,
    row_length: int,
    seed: int,
    judged: bool,
    formatting: bool,
    leave_out: bool,
    share_prompts: bool = False,
) -> PreferenceRows:
    """Read preferences, write their shards, and open rows of them; see `write_preference_shards` for the arguments.
    Of several processes the first writes.

    Raises:
        InputError: a row cannot be used, or none can.
    """
    if is_first_process():
        preferences = read_preferences(path)
        write_preference_shards(
            with_mismatched(preferences) if judged else preferences,
            tokenizer,
            destination,
            row_length,
            judged=judged,
            formatting=formatting,
            leave_out=leave_out,
            share_prompts=share_prompts,
        )
    wait_for_all()
    shards = TokenShards(destination, tokenizer.hash)
    return PreferenceRows(shards, row_length, seed, tokenizer.pad_id, share_prompts=share_prompts)
