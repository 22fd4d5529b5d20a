"""Every reader and every step that a recipe can name. A kind's file is imported when a recipe names it, not before."""

from typing import Annotated

from puna.config import Kinds
from puna.curate.step import GlobalStep, Reader, Step

READERS = {
    "folder": "puna.curate.readers.folder:FolderReader",
    "python": "puna.curate.readers.folder:PythonReader",
    "jsonl": "puna.curate.readers.rows:JsonlReader",
    "csv": "puna.curate.readers.rows:CsvReader",
    "parquet": "puna.curate.readers.rows:ParquetReader",
    "warc": "puna.curate.readers.web:WarcReader",
    "wet": "puna.curate.readers.web:WetReader",
    "wikipedia": "puna.curate.readers.dumps:WikipediaReader",
    "stackexchange": "puna.curate.readers.stackexchange:StackExchangeReader",
    "arxiv": "puna.curate.readers.arxiv:ArxivReader",
    "git": "puna.curate.readers.git:GitReader",
    "epub": "puna.curate.readers.books:EpubReader",
    "hub": "puna.curate.readers.hub:HubReader",
}
"""Kind of reader -> its class."""

STEPS = {
    "code_quality": "puna.curate.sources.code:CodeQuality",
    "code_headers": "puna.curate.sources.code:CodeHeaders",
    "gutenberg": "puna.curate.sources.gutenberg:Gutenberg",
    "latex": "puna.curate.sources.latex:Latex",
    "code_licences": "puna.curate.sources.licences:CodeLicences",
    "repair_text": "puna.curate.sources.repair:RepairText",
    "wikitext": "puna.curate.sources.wikitext:Wikitext",
    "c4": "puna.curate.filters.c4:C4",
    "classifier": "puna.curate.filters.classifier:Classifier",
    "dirty_words": "puna.curate.filters.dirty_words:DirtyWords",
    "fineweb": "puna.curate.filters.fineweb:FineWeb",
    "gopher_quality": "puna.curate.filters.gopher_quality:GopherQuality",
    "gopher_repetition": "puna.curate.filters.gopher_repetition:GopherRepetition",
    "language": "puna.curate.filters.language:Language",
    "length": "puna.curate.filters.length:Length",
    "pages": "puna.curate.filters.pages:Pages",
    "perplexity": "puna.curate.filters.perplexity:Perplexity",
    "pii": "puna.curate.filters.pii:PII",
    "repeated_n_grams": "puna.curate.filters.repeated_n_grams:RepeatedNGrams",
    "score_quantiles": "puna.curate.filters.score_quantiles:ScoreQuantiles",
    "token_divergence": "puna.curate.filters.token_divergence:TokenDivergence",
    "urls": "puna.curate.filters.urls:URLs",
    "book_duplicates": "puna.curate.dedup.books:BookDuplicates",
    "decontaminate": "puna.curate.dedup.decontaminate:Decontaminate",
    "exact_duplicates": "puna.curate.dedup.exact:ExactDuplicates",
    "line_duplicates": "puna.curate.dedup.lines:LineDuplicates",
    "near_duplicates": "puna.curate.dedup.minhash:NearDuplicates",
    "semantic_duplicates": "puna.curate.dedup.semantic:SemanticDuplicates",
    "substring_duplicates": "puna.curate.dedup.substrings:SubstringDuplicates",
    "url_duplicates": "puna.curate.dedup.urls:UrlDuplicates",
    "llama_quality": "puna.curate.quality_head:LlamaQuality",
}
"""Kind of step -> its class."""

AnyReader = Annotated[Reader, Kinds("reader", READERS)]
AnyStep = Annotated[Step | GlobalStep, Kinds("step", STEPS)]
