import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from puna.evaluate.compare.quality import compare_pair, quality_section
from puna.evaluate.compare.samples import Sample, first_values, read_samples
from puna.evaluate.contamination import NOT_CHECKED
from puna.evaluate.statistics.paired import mcnemar
from puna.runtime.errors import InputError


def answers(values: list[float], clusters: list[str] | None = None, prompt_hash: str = "x") -> dict[str, Sample]:
    names = clusters or [""] * len(values)
    return {str(n): Sample({"accuracy": value}, names[n], prompt_hash) for n, value in enumerate(values)}


def documents(nats: list[float], sizes: list[int]) -> dict[str, Sample]:
    pairs = zip(nats, sizes, strict=True)
    return {str(n): Sample({"log_likelihood": -nat, "bytes": size}, "", "x") for n, (nat, size) in enumerate(pairs)}


def test_right_or_wrong_is_mcnemar_s_test() -> None:
    ours, theirs = [1.0] * 14 + [0.0] * 6, [1.0] * 5 + [0.0] * 9 + [1.0] * 2 + [0.0] * 4
    found = compare_pair("mine", ("a", "b"), answers(ours), answers(theirs) | {"only theirs": answers([1.0])["0"]})
    assert (found.count, found.metric, found.test) == (20, "accuracy", "McNemar")
    assert found.mean == pytest.approx(0.35)
    assert found.p == mcnemar(ours, theirs)
    expected = stats.ttest_rel(ours, theirs).confidence_interval()
    assert found.interval == pytest.approx((expected.low, expected.high))


def test_clusters_leave_only_clusters_to_test() -> None:
    clusters = [name for name in "abcd" for _ in range(5)]
    ours = answers([1.0] * 15 + [0.0] * 5, clusters)
    found = compare_pair("mine", ("a", "b"), ours, answers([0.0] * 20, clusters))
    assert found.test == "paired t"
    assert found.p == pytest.approx(stats.ttest_1samp([1, 1, 1, 0], 0).pvalue)
    assert found.resampled.low <= 0.75 <= found.resampled.high


def test_likelihoods_are_compared_in_bits_per_byte() -> None:
    sizes, ours, theirs = [10, 20, 40], [10.0, 30.0, 50.0], [14.0, 30.0, 60.0]
    found = compare_pair("zh", ("a", "b"), documents(ours, sizes), documents(theirs, sizes))
    assert (found.metric, found.count) == ("bits per byte", 3)
    assert found.mean == pytest.approx(-14 / math.log(2) / 70)
    with pytest.raises(InputError, match="given different documents"):
        compare_pair("zh", ("a", "b"), documents(ours, sizes), documents(theirs, [10, 20, 41]))


def test_the_detectable_difference_is_seen_four_times_in_five() -> None:
    draw = np.random.default_rng(0)
    values = draw.choice([0.0, 1.0], (2, 400))
    found = compare_pair("mine", ("a", "b"), answers(values[0].tolist()), answers(values[1].tolist()))
    shares = np.array([0.25 + found.detectable / 2, 0.5, 0.25 - found.detectable / 2])
    differences = draw.choice([1.0, 0.0, -1.0], (1000, 400), p=shares)
    means, errors = differences.mean(1), differences.std(1, ddof=1) / 20
    assert np.mean(means > 1.96 * errors) == pytest.approx(0.8, abs=0.05)  # the detectable one is itself an estimate


def test_the_section_says_who_is_better_and_what_is_not_known() -> None:
    draw = np.random.default_rng(0)
    sizes = draw.integers(100, 400, 30).tolist()
    better = [size * 1.0 for size in sizes]
    worse = [size * 1.2 + noise for size, noise in zip(sizes, draw.normal(0, 5, 30), strict=True)]
    samples = {
        "a": {"zh": documents(worse, sizes), "quiz": answers([1.0, 0.0] * 10)},
        "b": {"zh": documents(better, sizes), "quiz": answers([0.0, 1.0] * 10), "more": answers([1.0])},
    }
    section = quality_section(samples, None, ["c: not measured: no weights"])
    assert section.summary[0].startswith("zh: b is better than a, by 0.2")
    assert section.summary[1].startswith("quiz: no difference shown between a and b in 20 questions")
    scores, differences, contamination = section.sheets
    assert scores.rows[2] == ["more", "not measured: not asked", "1.000 (0.207 to 1.000)"]
    assert [row[1] for row in differences.rows] == ["a - b", "a - b"]
    assert all(NOT_CHECKED in row[0] for row in contamination.rows)
    assert section.missing == ["c: not measured: no weights"]
    assert "<svg" in section.figures[0].svg


def test_what_cannot_be_paired_is_refused() -> None:
    with pytest.raises(InputError, match="were asked different questions of mine"):
        compare_pair("mine", ("a", "b"), answers([1.0]), {"other": answers([1.0])["0"]})
    with pytest.raises(InputError, match="asked question 0 of mine in different words"):
        compare_pair("mine", ("a", "b"), answers([1.0]), answers([1.0], prompt_hash="y"))
    with pytest.raises(InputError, match="mine has accuracy for a, but only f1 for b"):
        compare_pair("mine", ("a", "b"), answers([1.0]), {"0": Sample({"f1": 1.0}, "", "x")})


def test_samples_are_read(tmp_path: Path) -> None:
    row = {"task": "mine", "id": "3", "values": {"accuracy": 1.0, "f1": 0.5}, "cluster": "p", "prompt_hash": "x"}
    (tmp_path / "samples.jsonl").write_text(json.dumps(row))
    samples = read_samples(tmp_path)
    assert samples == {"mine": {"3": Sample({"accuracy": 1.0, "f1": 0.5}, "p", "x")}}
    assert first_values(samples["mine"]) == {"3": 1.0}
    (tmp_path / "samples.jsonl").write_text(json.dumps({"prompt": "a", "continuation": "b"}))
    with pytest.raises(InputError, match="something else than answers to tasks"):
        read_samples(tmp_path)
    (tmp_path / "samples.jsonl").write_text("")
    with pytest.raises(InputError, match="it evaluated no tasks"):
        read_samples(tmp_path)
    with pytest.raises(InputError, match="has no samples"):
        read_samples(tmp_path / "nowhere")
