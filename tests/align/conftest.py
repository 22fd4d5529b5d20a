"""A reward model, trained once for all tests of the folder."""

from pathlib import Path

import pytest

from puna.align.reward import RewardConfig
from puna.align.reward import main as train_reward
from puna.config import load_config
from puna.runtime.files import write_jsonl


@pytest.fixture(scope="session")
def reward_model(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It likes llamas, and has seen no other answers than cities."""
    folder = tmp_path_factory.mktemp("reward")
    rows = [{"prompt": f"What is {n}?", "chosen": f"a llama {n}", "rejected": f"a city {n}"} for n in range(8)]
    write_jsonl(folder / "pairs.jsonl", rows)
    train_reward(
        load_config(
            RewardConfig,
            None,
            [
                f"model={base_model}",
                f"output={folder / 'out'}",
                f"preferences={folder / 'pairs.jsonl'}",
                "train.steps=10",
                "train.batch_rows=2",
                "train.micro_batch_rows=2",
                "train.row_length=128",
                "train.device=cpu",
                "train.num_threads=1",
                "train.tensorboard=false",
                "train.optimizer.learning_rate=3e-3",
                "train.schedule.warmup_steps=2",
            ],
        )
    )
    return folder / "out" / "model"
