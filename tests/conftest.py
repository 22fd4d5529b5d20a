"""What every test folder shares: quiet single-threaded torch, the same examples at every run, and real data."""

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# For this process, for the workers of pytest-xdist and for what the tests start: one thread each.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

torch.set_num_threads(1)

# No example may fail for being slow on a busy machine. The default draws the same examples at every run;
# `--hypothesis-profile=explore`, as in `make test-all`, draws new ones.
UNTIMED: dict[str, Any] = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("repeatable", derandomize=True, database=None, **UNTIMED)
settings.register_profile("explore", print_blob=True, **UNTIMED)
settings.load_profile("repeatable")

REAL_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each worker a file at a time, as listed, so that what its tests share is made once.

    The files of `tests/parallel` go together: they share processes, and trainings that these have done.
    """
    from xdist.scheduler import LoadFileScheduling

    class Files(LoadFileScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file: str = super()._split_scope(nodeid)
            return "tests/parallel" if file.startswith("tests/parallel/") else file

    config.option.loadscopereorder = False
    return Files(config, log)


@pytest.fixture(scope="session")
def wait_until() -> Callable[[Callable[[], object]], None]:
    """Wait until a condition holds; longer than any machine takes, however busy, but not for ever."""

    def wait(condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + 200
        while not condition():
            assert time.monotonic() < deadline, "waited in vain"
            time.sleep(0.01)

    return wait


@pytest.fixture(scope="session")
def all_ended() -> Callable[[Iterable[int]], bool]:
    """Whether processes have ended, be they children of this one or anybody's."""

    def ended(process: int) -> bool:
        try:
            # "number (name) state ...", where Z is one that has ended and whose parent has not asked for its status.
            return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except (FileNotFoundError, ProcessLookupError):
            return True

    return lambda processes: all(ended(process) for process in processes)


@pytest.fixture
def real_data() -> Path:
    """Folder of published tokenizers, vectors and weights; the test is skipped where there is none."""
    if not REAL_DATA.is_dir():
        pytest.skip("no folder of real data beside the checkout")
    return REAL_DATA


@pytest.fixture(scope="session")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory with random weights, a byte-level BPE of 300 ids, and a chat template; trained once."""
    from puna.model.config import LlamaConfig
    from puna.model.initialize import initialize
    from puna.model.transformer import Transformer
    from puna.runtime.files import write_jsonl
    from puna.tokenizer.chat_template import builtin_template
    from puna.tokenizer.load import load_tokenizer
    from puna.tokenizer.train import TokenizerConfig
    from puna.tokenizer.train import main as train_tokenizer
    from puna.weights.load import save_model

    folder = tmp_path_factory.mktemp("base")
    words = "the llama walks to a good bad city in Peru and sleeps while the herd of Lima eats hay"
    write_jsonl(folder / "docs.jsonl", ({"id": str(n), "text": f"{n} {words} " * 4} for n in range(20)))
    train_tokenizer(TokenizerConfig(documents=folder / "docs.jsonl", output=folder / "tok", vocab_size=300))
    tokenizer = load_tokenizer(folder / "tok")
    tokenizer.chat_template = builtin_template("llama3")
    model = Transformer(
        LlamaConfig(
            vocab_size=320,
            dim=32,
            num_layers=2,
            num_heads=2,
            num_kv_heads=1,
            head_dim=16,
            hidden_dim=64,
            context_length=128,
        )
    )
    initialize(model, seed=0)
    save_model(model, folder / "model", tokenizer=tokenizer)
    return folder / "model"
