"""Data sets of the Hugging Face hub, file by file: the only reader that uses a network."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from puna.curate.document import Document, Rejected
from puna.curate.readers.bounds import Bounds
from puna.curate.readers.rows import CsvReader, JsonlReader, ParquetReader
from puna.runtime.errors import InputError

_READERS: dict[str, type[JsonlReader | CsvReader | ParquetReader]] = {
    ".parquet": ParquetReader,
    ".jsonl": JsonlReader,
    ".jsonl.gz": JsonlReader,
    ".jsonl.zst": JsonlReader,
    ".csv": CsvReader,
}


@dataclass(frozen=True)
class HubReader:
    """The Parquet, JSONL and CSV files of a data set of the Hugging Face hub, kept in its local cache."""

    kind: Literal["hub"] = "hub"
    """A data set of the Hugging Face hub; needs the network, or the hub's cache."""
    repository: str = field(kw_only=True)
    """OWNER/NAME."""
    pattern: str = "*.parquet"
    """Which files, as a shell pattern over their paths."""
    revision: str = "main"
    """Branch, tag or, so that nothing changes underneath, commit."""
    text_field: str = "text"
    """Column that holds the text."""
    id_field: str = "id"
    """Column that names the document; where it is absent, the file's name and the row's number do."""
    metadata: tuple[str, ...] = ()
    """Columns to keep beside the text."""
    bounds: Bounds = field(default_factory=Bounds)
    """What one file may cost."""

    def units(self) -> Sequence[str]:
        """Files of the data set.

        Raises:
            InputError: the hub cannot be reached, or holds no such file.
        """
        from huggingface_hub import HfApi

        try:
            names = HfApi().list_repo_files(self.repository, revision=self.revision, repo_type="dataset")
        except Exception as error:  # the client's own, its HTTP library's, and the operating system's
            raise self._unreachable(error) from error
        found = sorted(name for name in names if fnmatch(name, self.pattern) and name.endswith(tuple(_READERS)))
        if not found:
            raise InputError(
                f"The data set {self.repository} has no file that fits {self.pattern!r} and ends in "
                f"{', '.join(_READERS)}."
            )
        return found

    def read(self, unit: str) -> Iterator[Document | Rejected]:
        """The file's documents, as the reader of its format gives them."""
        from huggingface_hub import hf_hub_download

        try:
            path = hf_hub_download(self.repository, unit, revision=self.revision, repo_type="dataset")
        except Exception as error:
            raise self._unreachable(error) from error
        kind: Any = next(kind for ending, kind in _READERS.items() if unit.endswith(ending))
        reader = kind(
            path=Path(path),
            text_field=self.text_field,
            id_field=self.id_field,
            metadata=self.metadata,
            bounds=self.bounds,
        )
        for part in reader.units():
            for read in reader.read(part):
                # Rows without a name of their own are named by their file, which is unique with its folder only.
                named_by_file = read.id.startswith(f"{Path(path).name}:")
                name = f"{unit}{read.id.removeprefix(Path(path).name)}" if named_by_file else read.id
                yield replace(read, id=name)

    def _unreachable(self, error: Exception) -> InputError:
        return InputError(
            f"The data set {self.repository} (revision {self.revision}) cannot be read from the Hugging Face hub: "
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}. Check the "
            "name and the network, or copy the files here and read them with `parquet`, `jsonl` or `csv`."
        )
