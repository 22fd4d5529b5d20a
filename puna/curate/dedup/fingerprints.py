"""Normalised texts and their hashes, a column at a time."""

from typing import Literal

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

Difference = Literal["case", "digits", "accents", "punctuation", "whitespace"]


def normalize_texts(texts: pa.ChunkedArray, ignore: tuple[Difference, ...]) -> pa.ChunkedArray:
    """Texts without the differences that do not count: equal afterwards if they differ in nothing else.

    Args:
        texts: any strings.
        ignore: case folds to lower case, every digit becomes 0, accents and other combining marks go, punctuation and
            symbols go, runs of white space become one space and none at the ends.
    """
    if "case" in ignore:
        texts = pc.utf8_lower(texts)
    if "accents" in ignore:
        texts = pc.replace_substring_regex(pc.utf8_normalize(texts, "NFD"), r"\p{M}+", "")
    if "digits" in ignore:
        texts = pc.replace_substring_regex(texts, r"\p{Nd}", "0")
    if "punctuation" in ignore:
        texts = pc.replace_substring_regex(texts, r"[\p{P}\p{S}]+", "")
    if "whitespace" in ignore:
        texts = pc.utf8_trim_whitespace(pc.replace_substring_regex(texts, r"[\s\p{Z}]+", " "))
    return texts


def hash_texts(texts: pa.ChunkedArray) -> pa.Table:
    """MD5 of each text as two unsigned 64-bit columns, `low` and `high`.

    Chance collisions are out of the question; someone who plants two texts with one MD5 gains that one is removed.
    """
    column = pa.table({"text": texts})
    with duckdb.connect(config={"threads": 1}) as connection:
        connection.register("texts", column)
        query = "SELECT md5_number_lower(text) AS low, md5_number_upper(text) AS high FROM texts"
        return connection.sql(query).to_arrow_table()
