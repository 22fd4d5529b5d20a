"""Curation beside datatrove: filters, near-duplicates and tokens, from the same files, on two processes each.

Both read one corpus of JSON lines, apply the rules of Gopher (repetition, then quality) and C4, remove near-duplicates
by MinHash (5 words, 14 bands of 8 hashes of 64 bits), write the documents that are left and tokenise them with one
tokenizer.json. datatrove filters and signs in one pass, which is its fastest arrangement. The corpus is assembled on
this machine: documents, sources and docstrings of the installed packages and of /usr/share, the full sentences among
them once more as prose (half of the bytes; most other texts fail the filters), and copies of some prose with a known
share of words replaced. Each side runs once on a small corpus first, so that neither is timed
while it compiles or fills the disk cache.

    python benchmarks/curate_vs_datatrove.py [--quick] [--json] [--megabytes 120]
    python benchmarks/curate_vs_datatrove.py --growth     ours alone on 125, 250, 500 and 1000 MB

Needs the extras `curate` and `dev`, and spacy, with which datatrove splits English into words.
"""

import argparse
import contextlib
import gzip
import inspect
import itertools
import json
import logging
import os
import random
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from figures import Figure, command_line, figure, show

PROCESSES = 2
FILES = 16
EDIT_RATES = (0.002, 0.005, 0.01, 0.02, 0.05, 0.3)
"""Shares of words replaced in planted copies; with the last one they are no duplicates any more."""
MAX_BYTES = 100_000
"""Larger files are left out, as they would be half of the corpus in a few documents."""
PLANTED = 0.1
"""Share of the documents of prose that get a copy."""
SENTENCES = re.compile(r"[A-Z](?:[\w,;:()' -]|\.(?= )){80,1500}\.")
"""A paragraph of plain sentences."""
THRESHOLD = (1 / 14) ** (1 / 8)
"""Jaccard similarity at which the S-curve of 14 bands of 8 hashes is steepest."""
SHINGLE = 5

Documents = dict[str, str]


# The corpus


def assemble(folder: Path, megabytes: float, seed: int = 0) -> None:
    """Write about so many megabytes of documents to `FILES` files, the same ones on the same machine."""
    generator = random.Random(seed)
    folder.mkdir()
    written = 0
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context((folder / f"{number:02}.jsonl").open("w")) for number in range(FILES)]
        waiting: list[tuple[str, str]] = []
        for number, (kind, text) in enumerate(collect(megabytes * 1e6, generator)):
            name = f"{kind}-{number:07}"
            waiting.append((name, text))
            words = len(text.split())
            if kind == "prose" and 100 < words < 5000 and generator.random() < PLANTED:
                rate = generator.choice(EDIT_RATES)
                waiting.append((f"copy-{rate}-{name}", edit(text, rate, generator)))
            if len(waiting) > 2000:
                name, text = waiting.pop(generator.randrange(len(waiting)))
                written += write(files[number % FILES], name, text)
        generator.shuffle(waiting)
        for number, (name, text) in enumerate(waiting):
            written += write(files[number % FILES], name, text)


def write(file: Any, name: str, text: str) -> int:
    line: int = file.write(json.dumps({"id": name, "text": text}, ensure_ascii=False) + "\n")
    return line


def collect(num_bytes: float, generator: random.Random) -> Iterator[tuple[str, str]]:
    """Kinds and texts: prose and sources in turn by bytes; what is lacking is mixed from lines of the others."""
    roots = [sysconfig.get_path("purelib"), sysconfig.get_path("stdlib"), "/usr/share/doc"]
    walked = {f"{at}/{name}" for root in roots for at, _, names in os.walk(root) for name in names}
    sources = sorted(path for path in walked if path.endswith(".py"))
    kinds = (".md", ".rst", ".txt", "/METADATA")
    documents = sorted(path for path in walked if path.endswith(kinds) or path.startswith("/usr/share/doc/"))
    generator.shuffle(sources)
    generator.shuffle(documents)
    streams = {"prose": prose(itertools.chain(texts(documents), docstrings(sources)))}
    streams |= {"document": texts(documents), "docstrings": docstrings(sources), "source": texts(sources)}
    shares = {"prose": 0.5, "document": 0.1, "docstrings": 0.15, "source": 0.25}
    sizes = dict.fromkeys(streams, 0)
    lines: dict[str, list[str]] = {kind: [] for kind in streams}
    while sum(sizes.values()) < num_bytes:
        kind = min(streams, key=lambda kind: sizes[kind] / shares[kind])
        text = next(streams[kind], None)
        if text is None:
            text = "\n".join(generator.sample(lines[kind], min(len(lines[kind]), generator.randrange(5, 40))))
        elif len(lines[kind]) < 200_000:
            lines[kind] += text.splitlines()
        sizes[kind] += len(text)
        yield kind, text


def texts(paths: Iterable[str]) -> Iterator[str]:
    """Those files that are text, not too small and not too large."""
    for path in map(Path, paths):
        try:
            if not path.is_file() or path.is_symlink() or path.stat().st_size > MAX_BYTES:
                continue
            content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            text = content.decode()
        except (OSError, EOFError, UnicodeDecodeError):
            continue
        if 200 <= len(text) <= MAX_BYTES and "\0" not in text:
            yield text


def docstrings(paths: Iterable[str]) -> Iterator[str]:
    """All long strings of a module, which mostly are docstrings, as one text."""
    for text in texts(paths):
        found = [inspect.cleandoc(quoted) for quoted in re.findall(r'"""(.+?)"""', text, re.DOTALL)]
        if len(joined := "\n\n".join(found)) >= 500:
            yield joined


def prose(found: Iterable[str]) -> Iterator[str]:
    """The paragraphs of full sentences of each text, one a line: what a filter for web pages is meant to keep."""
    for text in found:
        paragraphs = [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]
        kept = [paragraph for paragraph in paragraphs if SENTENCES.fullmatch(paragraph)]
        if len("\n".join(kept)) >= 500:
            yield "\n".join(kept)


def edit(text: str, rate: float, generator: random.Random) -> str:
    """The text with a share of its words replaced by others of its words."""
    pieces = re.split(r"(\s+)", text)
    words = pieces[::2]
    pieces[::2] = [generator.choice(words) if word and generator.random() < rate else word for word in words]
    return "".join(pieces)


# The two sides, each in a process of its own; both leave OUTPUT/documents and say what they did


def ours(corpus: Path, tokenizer: Path, output: Path) -> dict[str, Any]:
    from puna.batches.tokenize import TokenizeConfig
    from puna.batches.tokenize import main as tokenize
    from puna.curate.dedup.minhash import NearDuplicates
    from puna.curate.filters.c4 import C4
    from puna.curate.filters.gopher_quality import GopherQuality
    from puna.curate.filters.gopher_repetition import GopherRepetition
    from puna.curate.main import CurateConfig, SourceConfig
    from puna.curate.main import main as curate
    from puna.curate.readers.rows import JsonlReader

    started = time.perf_counter()
    curate(
        CurateConfig(
            output=output / "curated",
            sources=(SourceConfig("corpus", JsonlReader(path=corpus)),),
            steps=(GopherRepetition(), GopherQuality(), C4(), NearDuplicates()),
            held_out_share=0,
            workers=PROCESSES,
        )
    )
    curated = time.perf_counter()
    tokenize(TokenizeConfig(output / "curated" / "documents", tokenizer, output / "tokens", workers=PROCESSES))
    ended = time.perf_counter()
    return {"filters and near-duplicates": curated - started, "tokens": ended - curated}


def theirs(corpus: Path, tokenizer: Path, output: Path) -> dict[str, Any]:
    import loguru

    loguru.logger.remove()
    logging.disable(logging.WARNING)
    os.environ["RAYON_NUM_THREADS"] = "1"
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup import MinhashDedupCluster, MinhashDedupFilter, MinhashDedupSignature
    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupBuckets
    from datatrove.pipeline.filters import C4QualityFilter, GopherQualityFilter, GopherRepetitionFilter
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer
    from datatrove.pipeline.writers import JsonlWriter

    def writer(name: str) -> JsonlWriter:
        return JsonlWriter(str(output / name), output_filename="${rank}.jsonl", compression=None)

    def run(name: str, pipeline: list[Any], tasks: int) -> float:
        started = time.perf_counter()
        logs = str(output / "logs" / name)
        workers = min(PROCESSES, tasks)
        LocalPipelineExecutor(pipeline, tasks=tasks, workers=workers, logging_dir=logs, skip_completed=False).run()
        return time.perf_counter() - started

    config = MinhashConfig(n_grams=SHINGLE, num_buckets=14, hashes_per_bucket=8)
    folder = {name: str(output / name) for name in ("filtered", "signatures", "buckets", "removed", "tokens")}
    filters = [
        JsonlReader(str(corpus)),
        GopherRepetitionFilter(exclusion_writer=writer("rejected_gopher_repetition")),
        GopherQualityFilter(exclusion_writer=writer("rejected_gopher_quality")),
        C4QualityFilter(exclusion_writer=writer("rejected_c4")),
        writer("filtered"),
        MinhashDedupSignature(folder["signatures"], config),
    ]
    seconds = {"filters": run("filters", filters, PROCESSES)}
    duplicates = [MinhashDedupBuckets(folder["signatures"], folder["buckets"], config=config)]
    seconds["near-duplicates"] = run("buckets", duplicates, config.num_buckets)
    seconds["near-duplicates"] += run(
        "clusters", [MinhashDedupCluster(folder["buckets"], folder["removed"], config, save_cluster_id=True)], 1
    )
    tokens = [
        JsonlReader(folder["filtered"]),
        MinhashDedupFilter(folder["removed"], exclusion_writer=writer("duplicates"), load_cluster_ids=True),
        writer("documents"),
        DocumentTokenizer(folder["tokens"], str(tokenizer), eos_token="<|end_of_text|>", shuffle_documents=False),
    ]
    seconds["tokens"] = run("tokens", tokens, PROCESSES)
    return seconds


# Measuring


def run_side(side: str, corpus: Path, tokenizer: Path, output: Path) -> dict[str, Any]:
    """Run one side; seconds of its stages, of everything, and the peak of memory of all its processes."""
    command = [sys.executable, __file__, "--side", side, "--corpus", str(corpus)]
    command += ["--tokenizer", str(tokenizer), "--output", str(output)]
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=out, stderr=errors)
        peak = 0
        while process.poll() is None:
            peak = max(peak, tree_bytes(process.pid))
            time.sleep(0.1)
        seconds = time.perf_counter() - started
        out.seek(0)
        errors.seek(0)
        if process.returncode:
            raise SystemExit(f"{side} failed:\n{out.read()[-2000:]}\n{errors.read()[-4000:]}")
        stages = json.loads(out.read().splitlines()[-1])
        stages["start and end"] = seconds - sum(stages.values())
        return {"stages": stages, "seconds": seconds, "peak": peak}


def tree_bytes(root: int) -> int:
    """Memory of a process and all below it; what several share counts once. Linux only, elsewhere 0."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, IndexError):
            parents.setdefault(int(entry.read_text().rpartition(")")[2].split()[1]), []).append(int(entry.parent.name))
    total, waiting = 0, [root]
    while waiting:
        process = waiting.pop()
        waiting += parents.get(process, [])
        with contextlib.suppress(OSError):
            rollup = Path(f"/proc/{process}/smaps_rollup").read_text()
            total += 1024 * int(re.search(r"^Pss:\s+(\d+)", rollup, re.MULTILINE)[1])  # type: ignore[index]
    return total


def corpus_size(corpus: Path) -> tuple[int, int]:
    """Documents and bytes of text."""
    documents = num_bytes = 0
    for row in read_jsonl(corpus):
        documents += 1
        num_bytes += len(row["text"].encode())
    return documents, num_bytes


def read_jsonl(folder: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.glob("*.jsonl")):
        with path.open() as file:
            yield from map(json.loads, file)


@dataclass
class Result:
    """What one side did with each document."""

    kept: Documents = field(default_factory=dict)
    passed: Documents = field(default_factory=dict)
    """Those that passed the filters, with their texts then."""
    reasons: dict[str, str] = field(default_factory=dict)
    """Why the others did not."""
    clusters: dict[str, int] = field(default_factory=dict)
    """Number of the cluster of near-duplicates, of those that are in one."""

    def near_duplicates(self, among: set[str]) -> dict[str, frozenset[str]]:
        """The documents that are in one cluster with each, itself included."""
        members: dict[int, set[str]] = {}
        for name in among & self.clusters.keys():
            members.setdefault(self.clusters[name], set()).add(name)
        alone = {name: frozenset([name]) for name in among}
        return alone | {name: frozenset(cluster) for cluster in members.values() for name in cluster}


def our_result(output: Path) -> Result:
    import pyarrow.parquet as pq

    result = Result()
    for part in ("documents", "rejected"):
        files = sorted((output / "curated" / part).glob("*.parquet"))
        for row in itertools.chain.from_iterable(pq.read_table(file).to_pylist() for file in files):
            name = row["id"]
            if part == "rejected" and not row["step"].startswith("near_duplicates"):
                result.reasons[name] = f"{row['step']}: {row['reason']}"
                continue
            result.passed[name] = row["text"]
            if row["near_duplicates_cluster"] is not None:
                result.clusters[name] = row["near_duplicates_cluster"]
            if part == "documents":
                result.kept[name] = row["text"]
    return result


def their_result(output: Path) -> Result:
    result = Result()
    for part in ("documents", "duplicates"):
        for row in read_jsonl(output / part):
            result.passed[row["id"]] = row["text"]
            if row["metadata"]["minhash_cluster_id"] != -1:
                result.clusters[row["id"]] = row["metadata"]["minhash_cluster_id"]
            if part == "documents":
                result.kept[row["id"]] = row["text"]
    for folder in sorted(output.glob("rejected_*")):
        for row in read_jsonl(folder):
            result.reasons[row["id"]] = f"{folder.name.removeprefix('rejected_')}: {row['metadata']['filter_reason']}"
    return result


def planted(result: Result) -> dict[str, float]:
    """How a side did on the planted copies of which both copy and original passed its filters."""
    counts: Counter[str] = Counter()
    for name, text in result.passed.items():
        if not name.startswith("copy-"):
            continue
        original = name.split("-", 2)[2]
        if original not in result.passed:
            continue
        similarity = jaccard(text, result.passed[original])
        found = name not in result.kept or original not in result.kept
        counts["found"] += found
        for label, real in (("real", similarity >= THRESHOLD), ("close", similarity >= 0.9)):
            counts[label] += real
            counts[f"{label} found"] += real and found
    return {
        "pairs": counts["real"],
        "recall": counts["real found"] / max(counts["real"], 1),
        "recall above 0.9": counts["close found"] / max(counts["close"], 1),
        "precision": counts["real found"] / max(counts["found"], 1),
    }


def jaccard(left: str, right: str) -> float:
    a, b = (
        {tuple(words[at : at + SHINGLE]) for at in range(len(words) - SHINGLE + 1)}
        for words in (re.findall(r"\w+", text.lower()) for text in (left, right))
    )
    return len(a & b) / max(len(a | b), 1)


def compare(ours: Result, theirs: Result) -> Iterator[tuple[str, float, float, str]]:
    """Figures of agreement, as (name, ours, theirs, unit); differences between the filters are printed."""
    everything = {*ours.passed, *ours.reasons}
    assert everything == {*theirs.passed, *theirs.reasons}, "the two sides did not see the same documents"
    differences: dict[tuple[str, str], list[str]] = {}
    for name in sorted(everything):
        reasons = ours.reasons.get(name, "passed"), theirs.reasons.get(name, "passed")
        if (reasons[0] == "passed") != (reasons[1] == "passed"):
            differences.setdefault(reasons, []).append(name)
    same = len(everything) - sum(map(len, differences.values()))
    yield "documents on which the filters agree, of all", same, len(everything), "documents"
    both = ours.passed.keys() & theirs.passed.keys()
    identical = sum(ours.passed[name].split() == theirs.passed[name].split() for name in both)
    yield "documents with the same text after the filters, of those both passed", identical, len(both), "documents"
    our_duplicates, their_duplicates = ours.near_duplicates(both), theirs.near_duplicates(both)
    same = sum(our_duplicates[name] == their_duplicates[name] for name in both)
    yield "documents with the same near-duplicates, of those both passed", same, len(both), "documents"
    yield "documents kept", len(ours.kept), len(theirs.kept), "documents"
    ours_found, theirs_found = planted(ours), planted(theirs)
    for name in ours_found:
        yield f"planted copies: {name}", ours_found[name], theirs_found[name], "pairs" if name == "pairs" else "share"
    print("filters disagree:", file=sys.stderr)
    for reasons, names in sorted(differences.items(), key=lambda item: -len(item[1])):
        print(f"  {len(names):>6}  ours {reasons[0]!r}, theirs {reasons[1]!r}, e.g. {names[0]}", file=sys.stderr)


def train_tokenizer(corpus: Path, folder: Path) -> Path:
    """A byte-level BPE of 8,192 tokens, of the corpus's first megabytes; both sides read its tokenizer.json."""
    from puna.tokenizer.train import train_byte_level_bpe

    rows = itertools.islice(read_jsonl(corpus), 2000)
    train_byte_level_bpe((row["text"] for row in rows), 8192, folder)
    return folder / "tokenizer.json"


def growth(folder: Path, sizes: Iterable[float]) -> Iterator[Figure]:
    """Our side on corpora of several sizes: seconds for a megabyte and the peak of memory, beside the smallest's."""
    first: tuple[float, float] | None = None
    for megabytes in sizes:
        corpus, output = folder / f"corpus-{megabytes}", folder / f"output-{megabytes}"
        assemble(corpus, megabytes)
        if first is None:
            tokenizer = train_tokenizer(corpus, folder / "tokenizer")
            run_side("ours", warm_up(folder), tokenizer, folder / "warm-ours")
        measured = run_side("ours", corpus, tokenizer, output)
        _, num_bytes = corpus_size(corpus)
        this = (num_bytes / 1e6 / measured["seconds"], measured["peak"] / 1e6)
        first = first or this
        yield figure(f"curation, growth, {megabytes} MB: speed, beside the smallest corpus", this[0], first[0], "MB/s")
        yield figure(
            f"curation, growth, {megabytes} MB: peak memory, beside the smallest corpus",
            this[1],
            first[1],
            "MB",
            less_is_better=True,
        )
        subprocess.run(["rm", "-r", str(corpus), str(output)], check=True)


def warm_up(folder: Path) -> Path:
    corpus = folder / "warm-up"
    if not corpus.exists():
        assemble(corpus, 0.5)
    return corpus


def benchmark(folder: Path, megabytes: float) -> Iterator[Figure]:
    corpus = folder / "corpus"
    assemble(corpus, megabytes)
    documents, num_bytes = corpus_size(corpus)
    tokenizer = train_tokenizer(corpus, folder / "tokenizer")
    measured = {}
    for side in ("ours", "theirs"):
        run_side(side, warm_up(folder), tokenizer, folder / f"warm-{side}")
        measured[side] = run_side(side, corpus, tokenizer, folder / side)
        for stage, seconds in measured[side]["stages"].items():
            print(f"{side:>6}  {stage:<28} {seconds:8.1f} s", file=sys.stderr)
    ours, theirs = measured["ours"], measured["theirs"]
    whole = f"curation, {num_bytes / 1e6:.0f} MB end to end"
    yield figure(whole, documents / ours["seconds"], documents / theirs["seconds"], "documents/s")
    megabytes_of = num_bytes / 1e6
    yield figure(whole, megabytes_of / ours["seconds"], megabytes_of / theirs["seconds"], "MB/s")
    peak = "curation, peak memory of all processes"
    yield figure(peak, ours["peak"] / 1e6, theirs["peak"] / 1e6, "MB", less_is_better=True)
    for name, our_value, their_value, unit in compare(our_result(folder / "ours"), their_result(folder / "theirs")):
        yield figure(f"curation, {name}", our_value, their_value, unit)


def main() -> None:
    parser = command_line(__doc__, "a small corpus: under 50 s")
    parser.add_argument("--megabytes", type=float, default=120, help="size of the corpus")
    parser.add_argument("--growth", action="store_true", help="ours alone on corpora of several sizes")
    parser.add_argument("--side", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    for name in ("corpus", "tokenizer", "output"):
        parser.add_argument(f"--{name}", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        run = ours if arguments.side == "ours" else theirs
        arguments.output.mkdir()
        print(json.dumps(run(arguments.corpus, arguments.tokenizer, arguments.output)))
        return
    with tempfile.TemporaryDirectory(prefix="curate-benchmark-") as name:
        folder = Path(name)
        if arguments.growth:
            figures = growth(folder, (2.5, 5, 10, 20) if arguments.quick else (125, 250, 500, 1000))
        else:
            figures = benchmark(folder, 1.5 if arguments.quick else arguments.megabytes)
        for found in figures:
            show(found, arguments.json)


if __name__ == "__main__":
    main()
