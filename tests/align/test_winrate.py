"""Win rates: by hand, against itself, and the divergence beside all logits at once."""

from pathlib import Path

import pytest
import torch

from puna.align.winrate import Answered, WinRateConfig, answer_divergence, figures
from puna.align.winrate import main as winrate
from puna.config import load_config
from puna.infer.draw import Drawn
from puna.model.transformer import Transformer
from puna.runtime.errors import InputError
from puna.runtime.files import read_jsonl, write_jsonl
from puna.runtime.manifest import Manifest
from puna.tokenizer.load import load_tokenizer
from puna.tokenizer.train import TokenizerConfig
from puna.tokenizer.train import main as train_tokenizer
from puna.weights.load import load_model, save_model


@pytest.fixture(scope="module")
def moved_model(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = load_model(base_model, dtype=torch.float32)
    with torch.no_grad():
        model.output.weight += 0.3 * torch.randn(model.output.weight.shape, generator=torch.Generator().manual_seed(1))
    folder = tmp_path_factory.mktemp("moved") / "model"
    save_model(model, folder, tokenizer=load_tokenizer(base_model))
    return folder


def run(model: Path, baseline: Path, judge: Path, folder: Path, *settings: str) -> dict[str, float]:
    write_jsonl(folder / "prompts.jsonl", [{"prompt": f"What is {n}?"} for n in range(5)])
    given = [f"model={model}", f"baseline={baseline}", f"judge={judge}", f"prompts={folder / 'prompts.jsonl'}"]
    given += [f"output={folder / 'out'}", "max_tokens=20", "engine.device=cpu", "engine.num_threads=1", *settings]
    winrate(load_config(WinRateConfig, None, given))
    return Manifest.read(folder / "out").results


def answered(greedy: list[float], free: list[list[float]], tokens: int) -> Answered:
    answer = Drawn("a", (1,) * tokens, 1.0, True)
    return Answered([answer] * len(greedy), [[answer] * len(own) for own in free], greedy, free)


def test_figures_by_hand() -> None:
    ours = answered([1.0, 2.0, 0.0, 5.0], [[1.0, 3.0], [0.0, 0.0], [1.0, 1.0], [4.0, 4.0]], 2)
    theirs = answered([0.0, 2.0, 1.0, 1.0], [[2.0, 2.0], [1.0, 0.0], [0.0, 0.0], [4.0, 5.0]], 4)
    found = figures(ours, theirs)
    assert found["greedy_win_rate"] == 2.5 / 4
    assert found["greedy_tie_rate"] == 1 / 4
    assert found["free_win_rate"] == (0.5 + 0.25 + 1.0 + 0.25) / 4
    assert found["free_tie_rate"] == (0 + 2 + 0 + 2) / 16
    assert found["greedy_reward_gain"] == 1.0
    assert found["free_reward"] == (2 + 0 + 1 + 4) / 4
    # All answers of ours are shorter by the same, so the regression cannot tell how much that does, and stays between.
    assert 0.5 < found["greedy_win_rate_equal_length"] < found["greedy_win_rate"]
    assert found["mean_tokens"] == 2
    assert found["baseline_mean_tokens"] == 4
    # Wilson's formula for 2 of 4, as 2.5 rounds to the even.
    z = 1.959964
    middle, half = (2 + z**2 / 2) / (4 + z**2), z / (4 + z**2) * (2 * 2 / 4 + z**2 / 4) ** 0.5
    assert found["greedy_win_rate_low"] == pytest.approx(middle - half, abs=1e-6)
    assert found["greedy_win_rate_high"] == pytest.approx(middle + half, abs=1e-6)


def test_a_model_ties_with_itself(base_model: Path, reward_model: Path, tmp_path: Path) -> None:
    found = run(base_model, base_model, reward_model, tmp_path)
    assert found["greedy_win_rate"] == 0.5
    assert found["greedy_tie_rate"] == 1.0
    assert found["greedy_win_rate_equal_length"] == pytest.approx(0.5)
    assert found["free_win_rate"] == 0.5, "the same seeds give the same answers"
    assert found["divergence_nats"] == 0.0
    rows = list(read_jsonl(tmp_path / "out" / "comparisons.jsonl"))
    assert [row["reward"] for row in rows] == [row["baseline_reward"] for row in rows]


def test_a_changed_model_is_told_apart(base_model: Path, moved_model: Path, reward_model: Path, tmp_path: Path) -> None:
    found = run(moved_model, base_model, reward_model, tmp_path)
    assert found["divergence_nats"] > 0
    assert found["greedy_tie_rate"] < 1
    assert found["greedy_win_rate_low"] <= found["greedy_win_rate"] <= found["greedy_win_rate_high"]
    (tmp_path / "greedy").mkdir()
    assert "divergence_nats" not in run(moved_model, base_model, reward_model, tmp_path / "greedy", "samples=0")


def test_the_divergence_is_that_of_all_logits(base_model: Path, moved_model: Path) -> None:
    model, baseline = (load_model(path, dtype=torch.float32) for path in (moved_model, base_model))
    prompt, answer = [1, 2, 3], [4, 5, 6, 7]

    def logprobs(each: Transformer) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = each(torch.tensor([prompt + answer])).log_softmax(-1)[0, 2:6]
        return found

    expected = torch.nn.functional.kl_div(logprobs(baseline), logprobs(model), log_target=True, reduction="sum")
    # float32 sums over 4 x 320 terms.
    assert answer_divergence(model, baseline, prompt, answer) == pytest.approx(expected.item(), rel=1e-5)


def test_wrong_settings_are_explained(base_model: Path, reward_model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="max_tokens has to be at least 1"):
        run(base_model, base_model, reward_model, tmp_path, "max_tokens=0")
    write_jsonl(tmp_path / "docs.jsonl", [{"id": "1", "text": "hay and herds of llamas " * 9}])
    train_tokenizer(TokenizerConfig(documents=tmp_path / "docs.jsonl", output=tmp_path / "tok", vocab_size=280))
    other = load_tokenizer(tmp_path / "tok")
    other.chat_template = load_tokenizer(base_model).chat_template
    save_model(load_model(base_model), tmp_path / "other", tokenizer=other)
    with pytest.raises(InputError, match=r"different tokenizers.*samples=0"):
        run(base_model, tmp_path / "other", reward_model, tmp_path)
    with pytest.raises(InputError, match="ForCausalLM"):
        run(base_model, base_model, base_model, tmp_path)
    assert not (tmp_path / "out").exists()
