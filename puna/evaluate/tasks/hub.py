"""Questions from the Hugging Face hub, in the columns of the local files: `data = "hub:"`.

The hub keeps every public data set as Parquet, too, by configuration and split, on a branch of its own; that is what is
downloaded, once, into the hub's cache. So no data set's own program is run.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from puna.evaluate.tasks.data import Row, data_file, is_hub, read_rows
from puna.runtime.errors import InputError
from puna.runtime.files import read_documents

_REVISION = "refs/convert/parquet"


@dataclass(frozen=True)
class Published:
    """Where the questions of a task are published, and how they become rows of its local file.

    Attributes:
        repository: OWNER/NAME of the data set.
        split: the part that is asked, or shown.
        convert: (row of the hub, configuration) -> row of the local file.
        configurations: which of the data set.
    """

    repository: str
    split: str
    convert: Callable[[Mapping[str, Any], str], Mapping[str, Any]]
    configurations: tuple[str, ...] = ("default",)


def read_questions(data: Path | None, name: str, published: Published) -> Iterator[Row]:
    """The rows of a file of the folder of benchmark data, or those of the hub where `data` is "hub:".

    Raises:
        InputError: they are not there; or see `read_rows` and `hub_rows`.
    """
    return hub_rows(published, name) if is_hub(data) else read_rows(data_file(data, name))


def hub_rows(published: Published, name: str, only: Sequence[str] = ()) -> Iterator[Row]:
    """The rows of a data set of the hub.

    Args:
        name: the local file that they are in place of.
        only: these configurations, where there are such; all where there are none.

    Raises:
        InputError: the hub cannot be reached, holds no such data, or rows lack what is needed.
    """
    chosen = [one for one in published.configurations if one in only] or list(published.configurations)
    folder = _download(published, name, chosen)
    numbers = count(1)
    for configuration in chosen:
        part = folder / configuration / published.split
        if not part.is_dir():
            raise InputError(
                f"The data set {published.repository} has no split {published.split!r} of configuration "
                f"{configuration!r} on the Hugging Face hub any more. Copy {name} into a folder, and set data to it."
            )
        for values, number in zip(read_documents(part), numbers, strict=False):
            where = f"{published.repository}: {configuration} {published.split}, row {number}"
            try:
                converted = published.convert(values, configuration)
            except (KeyError, IndexError, TypeError, ValueError) as error:
                raise InputError(f"{where}: not in the columns that are known of it ({error!r}).") from error
            yield Row(converted, where)


def _download(published: Published, name: str, configurations: Sequence[str]) -> Path:
    """A folder that holds CONFIGURATION/SPLIT/*.parquet."""
    import huggingface_hub

    patterns = [f"{one}/{published.split}/*.parquet" for one in configurations]
    try:
        return Path(
            huggingface_hub.snapshot_download(
                published.repository, repo_type="dataset", revision=_REVISION, allow_patterns=patterns
            )
        )
    except Exception as error:  # the client's own, its HTTP library's, and the operating system's
        said = str(error).strip().splitlines()
        raise InputError(
            f"The data set {published.repository} cannot be read from the Hugging Face hub: {type(error).__name__}: "
            f"{said[0] if said else 'no reason given'}. Check the network. Without one, copy {name} into a folder and "
            "set data to it; or run this once where there is a network, and copy the hub's cache (HF_HOME) here."
        ) from error
