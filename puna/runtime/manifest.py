"""`puna.json`: what an artifact is, and what it was made from.

Every stage leaves one in the folder that it writes. Following the `inputs` of a manifest to the manifests of
those folders gives the lineage of a model down to the raw text.
"""

import hashlib
import platform
import time
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import puna
from puna.runtime.errors import InputError
from puna.runtime.files import file_hash, read_json, write_json

FILE_NAME = "puna.json"


@cache
def code_version() -> str:
    """Release and a hash over the package's own sources, so that an edited checkout is told from a release."""
    package = Path(puna.__file__).parent
    digest = hashlib.sha256()
    for source in sorted(package.rglob("*.py")):
        digest.update(source.relative_to(package).as_posix().encode() + b"\0" + source.read_bytes())
    return f"{puna.__version__}+{digest.hexdigest()[:12]}"


@dataclass(frozen=True)
class Manifest:
    """The record beside an artifact."""

    stage: str
    """The command that made it, such as "pretrain"."""
    config: dict[str, Any]
    """Its whole resolved configuration."""
    inputs: dict[str, str]
    """Path of each input -> its content hash (`content_hash`)."""
    results: dict[str, Any] = field(default_factory=dict)
    """What the stage measured: counts, losses, seconds, each name with its unit."""
    code_version: str = field(default_factory=code_version)
    created: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
    """UTC."""
    machine: str = field(default_factory=platform.platform)

    def write(self, directory: Path) -> None:
        """Put this manifest into `directory`."""
        write_json(directory / FILE_NAME, asdict(self))

    @classmethod
    def read(cls, directory: Path) -> "Manifest":
        """Read the manifest of `directory`.

        Raises:
            InputError: there is none, or it is not a manifest.
        """
        values = read_json(directory / FILE_NAME)
        try:
            return cls(**values)
        except TypeError as error:
            raise InputError(f"{directory / FILE_NAME} is not a Puna manifest: {error}.") from error


def content_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, or of a folder's file names and bytes in name order.

    A folder's manifest does not count: the same artifact made twice has the same hash. Nor does README.md beside a
    manifest, the artifact's card, nor do hidden files.

    Raises:
        InputError: `path` does not exist.
    """
    if not path.exists():
        raise InputError(f"{path} does not exist.")
    if path.is_file():
        return file_hash(path)
    digest = hashlib.sha256()
    left_out = {FILE_NAME, "README.md"} if (path / FILE_NAME).exists() else {FILE_NAME}
    for file in sorted(path.rglob("*")):
        relative = file.relative_to(path)
        hidden = any(part.startswith(".") for part in relative.parts)
        if file.is_file() and not hidden and relative.as_posix() not in left_out:
            digest.update(relative.as_posix().encode() + b"\0" + file_hash(file).encode())
    return digest.hexdigest()
