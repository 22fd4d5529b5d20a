"""What to do when something is wrong: leave the data out, go back to the last good checkpoint, go on past it.

Every checkpoint is good as far as anyone can tell: none is written before the steps up to it have been judged and the
copies of its parameters compared. A run that went back ends in the bits of one that never saw the data it leaves out.
"""

from collections import Counter
from dataclasses import dataclass

from puna.batches.packing import Rows
from puna.runtime.errors import InputError
from puna.runtime.progress import say
from puna.train.checkpoint import Checkpoints
from puna.train.ledger import Ledger
from puna.train.quarantine import BadBatch, Quarantine
from puna.train.state import TrainState


@dataclass(frozen=True)
class Trouble:
    """Why training cannot simply go on; the same on every rank."""

    corruption: str = ""
    """Values that changed by themselves: which, and where."""
    bad: tuple[BadBatch, ...] = ()
    """Batches whose updates were left out."""


class Recovery:
    """Brings a run back to a good state.

    Args:
        state: of the run.
        checkpoints: where to go back to.
        quarantine: takes bad batches.
        ledger: books what is lost.
        limit: since one checkpoint, at most so many bad batches, and going back at most so often for corruption.
    """

    def __init__(
        self, state: TrainState, checkpoints: Checkpoints, quarantine: Quarantine, ledger: Ledger, limit: int
    ) -> None:
        self.state, self.checkpoints, self.quarantine = state, checkpoints, quarantine
        self.ledger, self.limit = ledger, limit
        self._corruptions: Counter[int] = Counter()

    def recover(self, trouble: Trouble, rows: Rows, batch_rows: int) -> None:
        """Go back, and see to it that the bad batches are not met again.

        Where there is no checkpoint yet, training goes on from where it is: the updates were left out.

        Args:
            trouble: what is wrong.
            rows: what batches are made of.
            batch_rows: rows in a batch.

        Raises:
            InputError: it has happened too often, or corrupted values cannot be undone.
        """
        went_back = self.checkpoints.restore(self.state)
        if trouble.corruption:
            self._count_corruption(trouble.corruption, went_back)
        if trouble.bad:
            self._check_divergence(trouble.bad, self.state.batch if went_back else 0)
        for bad in trouble.bad:
            path = self.quarantine.add(bad, rows, range(bad.batch * batch_rows, (bad.batch + 1) * batch_rows))
            say(
                f"In step {bad.step:,} {bad.reason} (loss {bad.loss}, norm of the gradient {bad.grad_norm}). Its batch "
                f"is left out; {path} names its documents."
            )
        if went_back:
            self.ledger.went_back(self.state.step)
            say(f"Going back to the checkpoint of step {self.state.step:,}.")

    def _count_corruption(self, corruption: str, went_back: bool) -> None:
        if not went_back:
            raise InputError(
                f"{corruption}. There is no checkpoint to go back to; start again, with train.checkpoint_every."
            )
        self._corruptions[self.state.step] += 1
        if self._corruptions[self.state.step] > self.limit:
            raise InputError(
                f"{corruption}. It is the {self._corruptions[self.state.step]}th time since the checkpoint of step "
                f"{self.state.step:,}: a machine seems to be broken. Take it out and start again."
            )
        say(f"{corruption}: a value has changed by itself.")

    def _check_divergence(self, new: tuple[BadBatch, ...], since: int) -> None:
        left_out = {batch for batch in self.quarantine.batches if batch >= since} | {bad.batch for bad in new}
        if len(left_out) > self.limit:
            raise InputError(
                f"In step {new[0].step:,} {new[0].reason} (loss {new[0].loss}, norm of the gradient "
                f"{new[0].grad_norm}), and {len(left_out)} batches had to be left out since the last checkpoint: "
                "training has diverged. The checkpoint is good; try a lower optimizer.learning_rate or a longer "
                "schedule.warmup_steps, or allow more with faults.max_rollbacks."
            )
