"""Readers: where documents come from. One file a format; `bounds` and `text` hold what all of them keep to."""

from puna.curate.readers.folder import read_folder, read_python_library

__all__ = ["read_folder", "read_python_library"]
