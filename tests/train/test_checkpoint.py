"""Checkpoints are whole, verified, and never seen half-written."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from puna.model.transformer import Transformer
from puna.runtime.errors import InputError
from puna.train.checkpoint import Checkpoints
from puna.train.config import OptimizerConfig
from puna.train.inject import damage, full_disk
from puna.train.optimizer import build_optimizers
from puna.train.state import TrainState

Build = Callable[[int], Transformer]
RUN = {"model": "tiny", "train": {"steps": 40}}


def fresh(tiny_model: Build, seed: int = 0, **optimizer: object) -> TrainState:
    model = tiny_model(seed)
    return TrainState(model, build_optimizers(model, OptimizerConfig(**optimizer)))  # type: ignore[arg-type]


def update(state: TrainState) -> None:
    generator = torch.Generator().manual_seed(state.step)
    for parameter in state.model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    for optimizer in state.optimizers:
        optimizer.step()
        optimizer.zero_grad()
    state.step += 1


def weights(state: TrainState) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in state.model.parameters()])


def saved(tiny_model: Build, directory: Path, steps: int, keep: int = 2) -> TrainState:
    """A state with a checkpoint of each of its steps."""
    state, checkpoints = fresh(tiny_model), Checkpoints(directory, RUN, keep)
    for _ in range(steps):
        update(state)
        checkpoints.save(state)
    assert checkpoints.finish() is None
    return state


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_what_is_saved_is_the_state_at_that_moment(tiny_model: Build, tmp_path: Path, kind: str) -> None:
    state, checkpoints = fresh(tiny_model, kind=kind), Checkpoints(tmp_path, RUN, 2)
    update(state)
    then = weights(state)
    checkpoints.save(state)
    update(state)  # while the checkpoint is being written
    after = weights(state)
    assert checkpoints.finish() is None

    other = fresh(tiny_model, 1, kind=kind)
    assert Checkpoints(tmp_path, RUN, 2).restore(other)
    assert other.step == 1
    assert torch.equal(weights(other), then)
    update(other)
    assert torch.equal(weights(other), after)  # the optimisers' state too


def test_only_the_newest_stay(tiny_model: Build, tmp_path: Path) -> None:
    saved(tiny_model, tmp_path, 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]


def test_another_run_is_refused(tiny_model: Build, tmp_path: Path) -> None:
    state = saved(tiny_model, tmp_path, 1)
    with pytest.raises(InputError, match=r"train\.steps was 40 and is now 41"):
        Checkpoints(tmp_path, {"model": "tiny", "train": {"steps": 41}}, 2).restore(state)


@pytest.mark.parametrize("file", ["data", ".metadata", "run.json"])
def test_a_damaged_one_is_set_aside_for_the_one_before(
    tiny_model: Build, tmp_path: Path, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(tiny_model, tmp_path, 2)
    newest = tmp_path / "step-00000002"
    damage(next(newest.glob("*.distcp")) if file == "data" else newest / file)

    state = fresh(tiny_model, 1)
    assert Checkpoints(tmp_path, RUN, 2).restore(state)
    assert state.step == 1
    expected = fresh(tiny_model)
    update(expected)
    assert torch.equal(weights(state), weights(expected))
    assert "step-00000002 is damaged" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged-step-00000002", "step-00000001"]


def test_a_missing_file_is_damage_and_all_damaged_is_an_error(tiny_model: Build, tmp_path: Path) -> None:
    state = saved(tiny_model, tmp_path, 2)
    for path in tmp_path.glob("step-*/*.distcp"):
        path.unlink()
    with pytest.raises(
        InputError, match=r"No checkpoint in .* can be read \(step-00000002: .*; step-00000001: .*Delete"
    ):
        Checkpoints(tmp_path, RUN, 2).restore(state)


def test_a_half_written_one_is_never_read(tiny_model: Build, tmp_path: Path) -> None:
    state = saved(tiny_model, tmp_path, 1)
    shutil.copytree(tmp_path / "step-00000001", tmp_path / ".step-00000009.partial")
    checkpoints = Checkpoints(tmp_path, RUN, 2)
    assert checkpoints.restore(state)
    assert state.step == 1
    checkpoints.save(state)
    assert checkpoints.finish() is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001"]


def test_a_full_disk_costs_the_checkpoint_not_the_run(
    tiny_model: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = saved(tiny_model, tmp_path, 1)
    update(state)
    checkpoints = Checkpoints(tmp_path, RUN, 2)
    with full_disk(room_bytes=20_000):
        checkpoints.save(state)
        failure = checkpoints.finish()
    assert failure is not None
    assert "File too large" in failure
    assert "A checkpoint could not be written" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    checkpoints.save(state)
    assert checkpoints.finish() is None
    assert len(list(tmp_path.iterdir())) == 2
