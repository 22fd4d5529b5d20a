"""The search itself: which trials there are, which run, and what became of them.

Optuna decides (samplers, pruners) and keeps the books (study.db); only this process asks it. Trials run in processes of
their own (`puna.finetune.search.trial`) and report their validations through a pipe.
"""

import contextlib
import math
import multiprocessing
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, Trial, TrialState

from puna.config import parse_config, to_plain
from puna.finetune.config import FinetuneConfig
from puna.finetune.search.config import (
    ChoiceParameter,
    FloatParameter,
    IntegerParameter,
    Parameter,
    PruningConfig,
    SearchConfig,
)
from puna.finetune.search.recipes import Recipe, base_recipe, input_paths, with_values
from puna.finetune.search.trial import Ended, Failed, Validated, run_trial
from puna.finetune.selection import SelectionConfig
from puna.runtime.devices import available_cores
from puna.runtime.errors import InputError
from puna.runtime.files import only_process
from puna.runtime.manifest import content_hash
from puna.runtime.seeds import derive_seed
from puna.train.metrics import read_metrics

REASON = "reason"
"""Attribute of a failed trial: why."""

_DEFINITION = "definition"
_MOST_FAILURES = 3
"""So many failures without one trial that ran to its end are the recipe's fault, not that of the values."""


@dataclass(eq=False)
class _Running:
    """A trial at work."""

    trial: Trial
    process: ForkServerProcess
    pipe: Connection
    num_reported: int
    pruned: bool = False
    failure: Failed | None = None


class Search:
    """A study and its trials.

    Args:
        config: what to search.

    Raises:
        InputError: the recipe, a parameter or an input is wrong; or `config.output` holds another search.
    """

    def __init__(self, config: SearchConfig) -> None:
        self.config = config
        self.recipe, base = base_recipe(config)
        self.distributions = {parameter.key: distribution(parameter) for parameter in config.parameters}
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        config.output.mkdir(parents=True, exist_ok=True)
        self._storage = optuna.storages.RDBStorage(f"sqlite:///{(config.output / 'study.db').resolve()}")
        self.study = optuna.create_study(
            storage=self._storage,
            study_name="puna",
            load_if_exists=True,
            direction="minimize" if config.goal == "lowest" else "maximize",
            pruner=_pruner(config.pruning),
        )
        self._define(base)
        self._selection = SelectionConfig(metric=config.metric, goal=config.goal)
        # Trials are forked from a server that has imported what they need, once for all; what is absent it leaves out.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([run_trial.__module__, "sklearn.metrics"])
        self._running: list[_Running] = []

    def _define(self, base: FinetuneConfig) -> None:
        """Refuse to go on with another search's trials."""
        config = self.config
        definition = {
            "recipe": {key: value for key, value in self.recipe.items() if key != "output"},
            "parameters": [to_plain(parameter) for parameter in config.parameters],
            "inputs": {str(path): content_hash(path) for path in input_paths(base) if path.exists()},
            "sampler": config.sampler,
            "seed": config.seed,
        }
        before = self.study.user_attrs.get(_DEFINITION)
        if before is None:
            self.study.set_user_attr(_DEFINITION, definition)
        elif changed := [key for key, value in definition.items() if before[key] != value]:
            raise InputError(
                f"{config.output} holds a search with another {' and another '.join(changed)}, whose trials cannot be "
                "compared with this one's. Choose another output, or delete that folder."
            )

    def folder(self, number: int) -> Path:
        """Where a trial's files are."""
        return self.config.output / "trials" / f"{number:04}"

    @property
    def finished(self) -> list[FrozenTrial]:
        """Trials that are over, by number."""
        return [trial for trial in self.study.get_trials(deepcopy=False) if trial.state.is_finished()]

    @property
    def best(self) -> FrozenTrial | None:
        """The best trial that ran to its end, if any did."""
        if all(trial.state != TrialState.COMPLETE for trial in self.finished):
            return None
        return self.study.best_trial

    def run(self, told: Callable[[FrozenTrial], None]) -> None:
        """Run trials until there are as many as wanted; those that were interrupted come first, and go on.

        Args:
            told: called after each trial that is over.

        Raises:
            InputError: a trial shows that something given is wrong, whatever its values; none runs to its end; or
                another process is at this search.
            RuntimeError: a trial cannot start, and it is a fault of ours.
        """
        with only_process(self.config.output, "puna search"):
            interrupted = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
            waiting = [Trial(self.study, trial._trial_id) for trial in interrupted]
            try:
                self._run(waiting, told)
            finally:
                for running in self._running:
                    running.process.terminate()
                    running.process.join()
        if self.best is None:
            raise self._none_ended()

    def _run(self, waiting: list[Trial], told: Callable[[FrozenTrial], None]) -> None:
        while True:
            while len(self._running) < self.config.workers and (trial := self._next(waiting)):
                if self._start(trial) is None:
                    self._over(trial, told)
            if not self._running:
                return
            ready = wait([running.pipe for running in self._running])
            for running in [running for running in self._running if running.pipe in ready]:
                if self._hear(running):
                    self._running.remove(running)
                    self._end(running)
                    self._over(running.trial, told)

    def _next(self, waiting: list[Trial]) -> Trial | None:
        if waiting:
            return waiting.pop(0)
        number = len(self.study.get_trials(deepcopy=False))
        if number >= self.config.trials:
            return None
        # A seed of its own for each trial: an interrupted search goes on as if it had not been.
        seed = derive_seed(self.config.seed, "trial", number) % 2**32
        if self.config.sampler == "tpe":
            self.study.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=self.config.workers > 1)
        else:
            self.study.sampler = optuna.samplers.RandomSampler(seed=seed)
        return self.study.ask(self.distributions)

    def _start(self, trial: Trial) -> _Running | None:
        """Start a trial's process; None where its values do not go together, which is noted."""
        folder = self.folder(trial.number)
        recipe = with_values(self.recipe, trial.params) | {"output": str(folder)}
        try:
            config = parse_config(FinetuneConfig, recipe, f"trial {trial.number}")
        except InputError as error:
            self._fail(trial, str(error))
            return None
        if not config.train.num_threads:
            share = max(1, available_cores() // self.config.workers)
            config = replace(config, train=replace(config.train, num_threads=share))
        folder.mkdir(parents=True, exist_ok=True)
        here, there = self._context.Pipe()
        arguments = (config, self.config.metric, folder / "log.txt", there)
        process = self._context.Process(target=run_trial, args=arguments)
        process.start()
        there.close()
        reported = self.study.get_trials(deepcopy=False)[trial.number].intermediate_values
        running = _Running(trial, process, here, num_reported=len(reported))
        self._running.append(running)
        return running

    def _hear(self, running: _Running) -> bool:
        """Take a message; whether the trial is over."""
        try:
            message = running.pipe.recv()
        except EOFError:
            running.process.join()
            running.failure = Failed(f"its process died (exit status {running.process.exitcode})", by_input=False)
            return True
        match message:
            case Validated(values):
                for number, value in enumerate(values[running.num_reported :], start=running.num_reported + 1):
                    running.trial.report(value, number)
                running.num_reported = max(running.num_reported, len(values))
                running.pruned = running.trial.should_prune()
                with contextlib.suppress(BrokenPipeError):  # it has died since, as the next message will say
                    running.pipe.send(running.pruned)
                return False
            case Failed():
                running.failure = message
            case Ended():
                pass
        running.process.join()
        return True

    def _end(self, running: _Running) -> None:
        trial, failure = running.trial, running.failure
        if failure is not None:
            if not (self.folder(trial.number) / "metrics.jsonl").exists():
                # Training had not begun: not the values, but what all trials share is wrong.
                if not self.finished:
                    # So that the same output can be used once that is mended.
                    optuna.delete_study(study_name=self.study.study_name, storage=self._storage)
                error = InputError if failure.by_input else RuntimeError
                log = self.folder(trial.number) / "log.txt"
                raise error(f"Trial {trial.number} could not start. {failure.reason} Its log is {log}.")
            self._fail(trial, failure.reason)
        elif running.pruned:
            self.study.tell(trial, state=TrialState.PRUNED)
        else:
            points = read_metrics(self.folder(trial.number) / "metrics.jsonl")
            number = self._selection.best(points)
            assert number is not None, "validations draw the metric"
            value = [point[self.config.metric] for point in points if self.config.metric in point][number]
            if math.isnan(value):
                self._fail(trial, f"{self.config.metric} is no number")
            else:
                self.study.tell(trial, value)

    def _fail(self, trial: Trial, reason: str) -> None:
        trial.set_user_attr(REASON, reason)
        self.study.tell(trial, state=TrialState.FAIL)

    def _over(self, trial: Trial, told: Callable[[FrozenTrial], None]) -> None:
        if self.config.keep_models == "best":
            self._tidy()
        finished = self.finished
        told(next(one for one in finished if one.number == trial.number))
        if len(finished) == _MOST_FAILURES and all(one.state == TrialState.FAIL for one in finished):
            raise self._none_ended()

    def _none_ended(self) -> InputError:
        reasons = [trial.user_attrs[REASON] for trial in self.finished if REASON in trial.user_attrs]
        why = f"The last that failed did because: {reasons[-1]} " if reasons else ""
        return InputError(
            f"None of {len(self.finished)} trials ran to its end. {why}Logs are in {self.config.output / 'trials'}. "
            "Change the recipe or the parameters, and choose another output."
        )

    def _tidy(self) -> None:
        """Delete what is large of trials that are not the best."""
        best = self.best
        for trial in self.finished:
            if best is None or trial.number != best.number:
                for part in ("model", "adapter", "checkpoints", "tokens"):
                    shutil.rmtree(self.folder(trial.number) / part, ignore_errors=True)
                (self.folder(trial.number) / "best.safetensors").unlink(missing_ok=True)

    def best_recipe(self) -> Recipe | None:
        """The recipe with the best trial's values."""
        return None if self.best is None else with_values(self.recipe, self.best.params)


def distribution(parameter: Parameter) -> BaseDistribution:
    """A parameter's values, as optuna takes them."""
    match parameter:
        case FloatParameter():
            return FloatDistribution(parameter.low, parameter.high, log=parameter.log)
        case IntegerParameter():
            return IntDistribution(parameter.low, parameter.high, log=parameter.log, step=parameter.step)
        case ChoiceParameter():
            return CategoricalDistribution(parameter.values)
    raise AssertionError(parameter)


def _pruner(pruning: PruningConfig) -> optuna.pruners.BasePruner:
    """Validations are what optuna calls steps, counted from 1."""
    match pruning.kind:
        case "none":
            return optuna.pruners.NopPruner()
        case "median":
            return optuna.pruners.MedianPruner(pruning.startup_trials, n_warmup_steps=pruning.min_validations)
        case "hyperband":
            return optuna.pruners.HyperbandPruner(pruning.min_validations)
