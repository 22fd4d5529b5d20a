"""The loss curve of instruction tuning beside trl's SFTTrainer: same model, same conversations, same batches."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from puna.config import load_config
from puna.finetune.config import FinetuneConfig
from puna.finetune.main import main as finetune
from puna.runtime.files import write_jsonl
from puna.tokenizer.chat import render_chat
from puna.tokenizer.load import load_tokenizer
from puna.train.metrics import read_metrics


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_loss_curve_is_that_of_trl(base_model: Path, tmp_path: Path) -> None:
    """All four conversations are in every batch, so that the order does not matter; the rest is set to be the same."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trl = pytest.importorskip("trl")
        datasets = pytest.importorskip("datasets")
        from transformers import AutoModelForCausalLM

    questions = ["Where?", "Who walks there?", "What does it eat?", "And then?"]
    answers = ["Lima", "the herd", "hay in Peru", "it sleeps"]
    rows = [{"prompt": question, "completion": answer} for question, answer in zip(questions, answers, strict=True)]
    write_jsonl(tmp_path / "data.jsonl", rows)
    tokenizer = load_tokenizer(base_model)
    chats = [
        render_chat(tokenizer, [{"role": "user", "content": q}, {"role": "assistant", "content": a}])
        for q, a in zip(questions, answers, strict=True)
    ]
    lengths = [len(chat.ids) for chat in chats]
    assert max(lengths) < 2 * min(lengths), "one conversation a row"
    steps = 20
    settings = [
        f"model={base_model}",
        f"output={tmp_path / 'ours'}",
        f"conversations={tmp_path / 'data.jsonl'}",
        f"train.steps={steps}",
        "train.batch_rows=4",
        "train.micro_batch_rows=4",
        f"train.row_length={max(lengths)}",
        "train.log_every=1",
        "train.device=cpu",
        "train.num_threads=1",
        "train.tensorboard=false",
        "train.optimizer.learning_rate=1e-2",
        "train.optimizer.beta2=0.999",
        "train.optimizer.weight_decay=0.0",
        "train.schedule.kind=constant",
        "train.schedule.warmup_steps=0",
    ]
    finetune(load_config(FinetuneConfig, None, settings))
    ours = [point["train/loss"] for point in read_metrics(tmp_path / "ours" / "metrics.jsonl")]

    tokenized = datasets.Dataset.from_list([{"input_ids": chat.ids, "completion_mask": chat.mask} for chat in chats])

    class Curve(trl.trainer.sft_trainer.TrainerCallback):
        losses: list[float] = []  # noqa: RUF012

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
            self.losses += [logs["loss"]] if "loss" in logs else []

    arguments = trl.SFTConfig(
        output_dir=str(tmp_path / "theirs"),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        adam_beta2=0.999,
        weight_decay=0.0,
        max_grad_norm=1.0,
        logging_steps=1,
        logging_nan_inf_filter=False,
        completion_only_loss=True,
        max_length=max(lengths),
        packing=False,
        bf16=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=False,
    )
    from transformers import AutoTokenizer

    trainer = trl.SFTTrainer(
        AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32),
        args=arguments,
        train_dataset=tokenized,
        processing_class=AutoTokenizer.from_pretrained(base_model),
        callbacks=[Curve()],
    )
    trainer.train()
    theirs = Curve.losses
    assert len(ours) == len(theirs) == steps
    differences = [abs(one - other) for one, other in zip(ours, theirs, strict=True)]
    # float32 sums in another order, amplified by 20 steps of AdamW at a large learning rate.
    assert max(differences) < 1e-3, list(zip(ours, theirs, strict=True))
    assert sum(differences) / steps < 2e-4
    assert ours[-1] < ours[0] / 2
