"""All that one training does against over-fitting and forgetting, put around its rows, loss and measurements."""

from collections.abc import Callable
from pathlib import Path

from puna.batches.mixture import MixedRows
from puna.batches.packing import PackedRows, Rows
from puna.finetune.config import FinetuneConfig
from puna.finetune.neftune import with_noise
from puna.finetune.numbered import NumberedRows
from puna.finetune.regularize.adversary import with_adversary
from puna.finetune.regularize.agreement import Divergence, with_agreement
from puna.finetune.regularize.config import EARLIER_LOSS, EarlierConfig, RegularizationConfig
from puna.finetune.regularize.dropout import add_dropout
from puna.finetune.regularize.earlier import (
    bits_per_byte,
    loss_on,
    open_earlier,
    with_replayed_loss,
    with_replayed_rows,
)
from puna.finetune.regularize.earlier_task import EarlierTask
from puna.finetune.regularize.ewc import FISHER_FILE, diagonal_fisher, ewc_penalty, load_fisher, save_fisher
from puna.finetune.regularize.rates import layer_rates
from puna.finetune.selection import Measure
from puna.model.transformer import Transformer
from puna.peft.heads import has_head
from puna.peft.method import Training
from puna.runtime.devices import open_device
from puna.runtime.errors import InputError
from puna.runtime.manifest import content_hash
from puna.runtime.progress import say
from puna.tokenizer.base import Tokenizer
from puna.train.loss import Loss, causal_lm_loss, with_penalty


class Safeguards:
    """What `regularization`, `earlier`, `neftune_alpha` and the method of `peft` ask for.

    Make it when the model has its adapters and not yet a head: the loss on earlier data is measured, and what EWC holds
    on to is estimated, at the model as it is then.

    Args:
        training: what the method asks for.

    Attributes:
        inputs: content hashes of the files read, by path.
        after_update: see `puna.train.loop.fit`.

    Raises:
        InputError: earlier data cannot be read, or the Fisher information does not fit the model.
    """

    def __init__(self, config: FinetuneConfig, model: Transformer, tokenizer: Tokenizer, training: Training) -> None:
        self._config, self._model = config, model
        self._rates, self.after_update = training.rates, training.after_update
        self._penalties = [training.penalty] if training.penalty is not None else []
        self._settings = config.regularization or RegularizationConfig()
        self._earlier = earlier = config.earlier or EarlierConfig()
        self._with_dropout = self._add_dropout()
        ewc = self._settings.ewc
        paths = [earlier.train, earlier.held_out, earlier.task_model, earlier.task_data, ewc.fisher if ewc else None]
        self.inputs = {str(path): content_hash(path) for path in paths if path is not None}
        if (earlier.train or earlier.held_out) and has_head(config.model):
            raise InputError(
                f"{config.model} has a head and no projection to the vocabulary, so it has no loss of the next token. "
                "Of what it learnt before, measure earlier.task_model on earlier.task_data, and hold on to it by "
                "regularization.ewc.fisher."
            )
        self._replayed = self._open(earlier.train, "earlier", tokenizer)
        self._held_out = self._open(earlier.held_out, "earlier-held-out", tokenizer)
        self._task = None
        if earlier.task_model is not None and earlier.task_data is not None:
            self._task = EarlierTask(earlier.task_model, earlier.task_data)
        if ewc is not None or earlier.is_measured:
            model.to(open_device(config.train.device, config.train.num_threads))
        if ewc is not None:
            if ewc.fisher is not None:
                information = load_fisher(ewc.fisher, model, content_hash(config.model))
            else:
                assert self._replayed is not None, "checked by FinetuneConfig"
                num_rows = min(ewc.rows, self._replayed.rows_per_epoch)
                information = diagonal_fisher(model, self._replayed, causal_lm_loss, num_rows)
            self._penalties.append(ewc_penalty(model, information, ewc.strength))
        self._before = self._measure(model)

    def _add_dropout(self) -> Callable[[Loss], Loss]:
        settings = self._settings
        if not settings.drops:
            return lambda loss: loss
        rates = {"residual": settings.residual_dropout, "embedding": settings.embedding_dropout}
        return add_dropout(self._model, **rates, seed=self._config.train.seed)

    def _open(self, path: Path | None, name: str, tokenizer: Tokenizer) -> PackedRows | None:
        if path is None:
            return None
        return open_earlier(path, tokenizer, self._config.train, self._config.output / "tokens" / name)

    def around_tokens(self, rows: PackedRows | MixedRows, loss: Loss, divergence: Divergence) -> tuple[Rows, Loss]:
        """Rows and loss of a training by the next token, safeguarded."""
        if self._earlier.replay_share:
            assert self._replayed is not None
            rows = with_replayed_rows(rows, self._replayed, self._earlier.replay_share)
        return self._around(rows, loss, divergence)

    def around_task(self, rows: Rows, loss: Loss, divergence: Divergence, units_per_row: float) -> tuple[Rows, Loss]:
        """Rows and loss of a training with a head, safeguarded.

        Args:
            units_per_row: units of the loss in a mean row.
        """
        if not self._earlier.replay_share:
            return self._around(rows, loss, divergence)
        assert self._replayed is not None
        around = self._around(rows, loss, divergence)[1]
        replay = self._with_dropout(causal_lm_loss), self._replayed, self._earlier.replay_share, units_per_row
        return NumberedRows(rows), with_replayed_loss(around, *replay)

    def _around(self, rows: Rows, loss: Loss, divergence: Divergence) -> tuple[Rows, Loss]:
        settings, seed, alpha = self._settings, self._config.train.seed, self._config.neftune_alpha
        if alpha:
            loss = with_noise(loss, alpha, seed)
        loss = self._with_dropout(loss)
        if settings.rdrop:
            loss = with_agreement(loss, settings.rdrop, divergence)
        if settings.adversary is not None:
            loss = with_adversary(loss, settings.adversary)
        for penalty in self._penalties:
            loss = with_penalty(loss, penalty)
        return (NumberedRows(rows) if alpha or settings.drops or settings.rdrop else rows), loss

    def rates(self) -> dict[str, float]:
        """Factors of learning rates, by parameter; call it when the head is on the model."""
        decay = self._settings.layer_decay
        by_layer = {} if decay == 1 else layer_rates(self._model, decay)
        names = [*by_layer, *(name for name in self._rates if name not in by_layer)]
        return {name: by_layer.get(name, 1.0) * self._rates.get(name, 1.0) for name in names}

    def measuring(self, measure: Measure) -> Measure:
        """The same, and what is left of what the model learnt before."""

        def both(model: Transformer, step: int) -> dict[str, float]:
            return measure(model, step) | self._measure(model)

        return both

    def _measure(self, model: Transformer) -> dict[str, float]:
        measured = {} if self._task is None else self._task.measure(model)
        if self._held_out is not None:
            measured[EARLIER_LOSS] = loss_on(model, self._held_out, self._earlier.measured_rows)
        return measured

    def results(self) -> dict[str, float]:
        """What the trained model has kept of what it learnt before, beside that before training, for the manifest; says
        it too."""
        results: dict[str, float] = {}

        def note(name: str, before: float, after: float) -> None:
            results.update({f"{name}_before": before, f"{name}_after": after})
            say(f"{name.replace('_', ' ')}: {before:.4f} before training, {after:.4f} after")

        after = self._measure(self._model)
        for curve, value in after.items():
            note(curve.replace("/", "_"), self._before[curve], value)
        if self._held_out is not None:
            nats = self._before[EARLIER_LOSS], after[EARLIER_LOSS]
            results["forgetting"] = nats[1] - nats[0]
            say(f"forgetting: {results['forgetting']:+.4f} nats per token")
            shards = self._held_out.shards
            if shards.mask(0) is None:
                note("earlier_bits_per_byte", bits_per_byte(nats[0], shards), bits_per_byte(nats[1], shards))
        return results

    def save_fisher(self, rows: Rows, loss: Loss, directory: Path) -> None:
        """Write what this training's data needs of the model, if that was asked for.

        Args:
            rows: the training data.
            loss: of the task, without safeguards.
            directory: the model directory, written already.
        """
        if self._settings.fisher_rows:
            information = diagonal_fisher(self._model, rows, loss, self._settings.fisher_rows)
            save_fisher(self._config.output / FISHER_FILE, information, content_hash(directory))
            say(f"Wrote {self._config.output / FISHER_FILE}")
