"""Constrained answers: what they cost beside unconstrained ones, and beside xgrammar.

The schemas of MaskBench (JSONSchemaBench) with their valid and invalid instances are compiled for Llama 3's vocabulary
of 128,256 tokens. For each schema that both sides support, every valid instance is walked token by token: compute which
tokens may follow, then take in the next one. Both sides see the same schemas and tokens, on one thread, in turn. Then
the engine generates with a small model of the same vocabulary, with and without a constraint.

    python benchmarks/constrained.py [--quick] [--json] [--schemas FILE] [--tokenizer FOLDER]

xgrammar is used where it is installed (pip install xgrammar); without it the figures of `theirs` are absent.
"""

import gzip
import json
import statistics
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from figures import command_line, figure, show

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
NUMBERS = {"type": "array", "items": {"type": "integer"}, "minItems": 1000}
"""Goes on for as long as the measurement does."""


class Side(ABC):
    """One library: schemas to matchers, and matchers along an instance's tokens."""

    @abstractmethod
    def compile(self, schema: str) -> Any:
        """What `walk` starts from, or None where the schema is not supported."""

    @abstractmethod
    def walk(self, compiled: Any, ids: Sequence[int]) -> bool:
        """Compute a mask and take in a token, for all of them; whether they are a whole answer."""


class Puna(Side):
    def __init__(self, tokenizer: Any) -> None:
        from puna.infer.constrain import Constraints

        self._constraints = Constraints(tokenizer, tokenizer.vocab_size)
        self._end = min(tokenizer.stop_ids)
        self.compile('{"type": "null"}')  # reads the vocabulary

    def compile(self, schema: str) -> Any:
        from puna.infer.constrain import Constraint

        compiled = self._constraints.compile(Constraint(json_schema=schema))
        return None if compiled.exception() else compiled.result()

    def walk(self, compiled: Any, ids: Sequence[int]) -> bool:
        matcher = compiled.copy()
        for token_id in ids:
            if not matcher.allowed()[token_id]:
                return False
            matcher.note(token_id)
        return bool(matcher.allowed()[self._end])


class Xgrammar(Side):
    def __init__(self, tokenizer: Any) -> None:
        import xgrammar

        vocabulary = [tokenizer.token_bytes(token_id) for token_id in range(tokenizer.vocab_size)]
        ends = sorted(tokenizer.stop_ids)
        info = xgrammar.TokenizerInfo(vocabulary, xgrammar.VocabType.RAW, stop_token_ids=ends)
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=1)
        self._bits = xgrammar.allocate_token_bitmask(1, tokenizer.vocab_size)
        self._library = xgrammar
        self._end = ends[0]

    def compile(self, schema: str) -> Any:
        try:
            return self._compiler.compile_json_schema(schema, strict_mode=False)
        except (RuntimeError, ValueError):
            return None

    def walk(self, compiled: Any, ids: Sequence[int]) -> bool:
        matcher = self._library.GrammarMatcher(compiled)
        for token_id in (*ids, self._end):
            matcher.fill_next_token_bitmask(self._bits)
            if not matcher.accept_token(token_id):
                return False
        return True


@dataclass
class Found:
    """What was measured of one side."""

    compile_ms: dict[str, float] = field(default_factory=dict)
    token_us: dict[str, float] = field(default_factory=dict)
    wrong: int = 0
    """Instances that were judged otherwise than they should."""


def measure(side: Side, rows: Sequence[dict[str, Any]], tokenizer: Any, found: Found) -> None:
    for row in rows:
        start = time.perf_counter()
        compiled = side.compile(json.dumps(row["schema"]))
        compile_ms = (time.perf_counter() - start) * 1e3
        if compiled is None:
            continue
        seconds, num_tokens = 0.0, 0
        for test in row["tests"]:
            ids = tokenizer.encode(json.dumps(test["data"], ensure_ascii=False), continuation=True)
            start = time.perf_counter()
            accepted = side.walk(compiled, ids)
            seconds += (time.perf_counter() - start) * test["valid"]
            num_tokens += (len(ids) + 1) * test["valid"]
            found.wrong += accepted != test["valid"]
        found.compile_ms[row["id"]] = compile_ms
        if num_tokens:
            found.token_us[row["id"]] = seconds / num_tokens * 1e6


def microseconds_per_token(tokenizer: Any, rows: int, rounds: int) -> tuple[float, float]:
    """Of a step of the engine, with a constraint in every row and without; the median of several rounds in turn."""
    import torch

    from puna.infer.config import EngineConfig
    from puna.infer.constrain import Constraint
    from puna.infer.engine import Engine
    from puna.infer.sampling import SamplingParams
    from puna.model.config import LlamaConfig
    from puna.model.initialize import initialize
    from puna.model.transformer import Transformer

    torch.set_num_threads(1)
    model = Transformer(LlamaConfig(tokenizer.vocab_size, 64, 2, 4, 2, 16, 128, context_length=256))
    initialize(model, seed=0)
    engine = Engine(model.eval(), tokenizer, EngineConfig(max_rows=rows))
    free = SamplingParams(max_tokens=100, ignore_eos=True, seed=0)
    bound = SamplingParams(max_tokens=100, constraint=Constraint(json_schema=json.dumps(NUMBERS)), seed=0)
    times: dict[SamplingParams, list[float]] = {free: [], bound: []}
    engine.generate([[1]], bound)  # compiles
    for _ in range(rounds):
        for params, samples in times.items():
            start = time.perf_counter()
            completions = engine.generate([[1]] * rows, params)
            samples.append((time.perf_counter() - start) / sum(len(c.ids) for c in completions) * 1e6)
    return statistics.median(times[bound]), statistics.median(times[free])


def main() -> None:
    parser = command_line(__doc__, "every eighth schema: under 50 s")
    parser.add_argument("--schemas", type=Path, default=DATA / "structured" / "maskbench_schemas.jsonl.gz")
    parser.add_argument("--tokenizer", type=Path, default=DATA / "tokenizers" / "llama3", help="folder of a tokenizer")
    arguments = parser.parse_args()
    if not arguments.schemas.exists() or not arguments.tokenizer.exists():
        sys.exit("There is no data beside the checkout: name MaskBench's schemas (--schemas) and a --tokenizer.")

    from puna.tokenizer.load import load_tokenizer

    with gzip.open(arguments.schemas, "rt") as file:
        rows = [json.loads(line) for line in file][:: 8 if arguments.quick else 1]
    tokenizer = load_tokenizer(arguments.tokenizer)
    sides: list[Side] = [Puna(tokenizer)]
    try:
        sides.append(Xgrammar(tokenizer))
    except ModuleNotFoundError as error:
        print(f"{error}: the figures stand alone.", file=sys.stderr)
    measured = [Found() for _ in sides]
    for first in range(0, len(rows), 20):  # in turn, so that a machine whose speed drifts hits both alike
        for side, found in zip(sides, measured, strict=True):
            measure(side, rows[first : first + 20], tokenizer, found)

    def report(name: str, unit: str, both: Sequence[float], less_is_better: bool = True) -> None:
        theirs = both[1] if len(both) > 1 else None
        show(figure(f"constrained, {name}", both[0], theirs, unit, less_is_better=less_is_better), arguments.json)

    def compare(name: str, unit: str, samples: Sequence[dict[str, float]]) -> None:
        common = set.intersection(*(set(sample) for sample in samples))
        for label, of in (("median", statistics.median), ("worst", max)):
            report(f"{name}, {label}", unit, [of(sample[key] for key in common) for sample in samples])

    shares = [len(found.compile_ms) / len(rows) for found in measured]
    report("schemas supported", "share", shares, less_is_better=False)
    report("instances misjudged in those", "count", [found.wrong for found in measured])
    compare("compile a schema", "ms", [found.compile_ms for found in measured])
    compare("mask and advance", "µs/token", [found.token_us for found in measured])
    for batch in (1, 8):
        both = microseconds_per_token(tokenizer, batch, 3 if arguments.quick else 9)
        report(f"engine, {batch} rows: constrained / free", "µs/token", both)


if __name__ == "__main__":
    main()
