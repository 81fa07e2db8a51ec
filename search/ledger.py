"""The Optuna study behind a run: proposals, results and failures as attributes of its trials."""

from __future__ import annotations

import json
import warnings
from collections.abc import Container, Sequence
from dataclasses import asdict
from typing import Any

import optuna
from optuna.storages import BaseStorage, JournalStorage
from optuna.trial import FrozenTrial, Trial, TrialState

from .grammar import Proposal
from .journal import RunJournal
from .records import Failure
from .records import TrialState as RecordState
from .samplers import GenomeSampler
from .store import RunError, RunStore
from .study import Study

PROPOSAL, RUNG, FAILURE = "proposal", "rung", "failure"
"""Names of a trial's attributes; the rung's number follows the second."""

_STATES: dict[RecordState, TrialState] = {
    "complete": TrialState.COMPLETE,
    "stopped": TrialState.PRUNED,
    "infeasible": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}


class _Journal(JournalStorage):
    """Optuna's `ask` looks through all trials for one that waits, a tenth of a second's work at
    100,000; a run enqueues none."""

    def get_all_trials(
        self,
        study_id: int,
        deepcopy: bool = True,
        states: Container[TrialState] | None = None,
    ) -> list[FrozenTrial]:
        if states == (TrialState.WAITING,):
            return []
        return super().get_all_trials(study_id, deepcopy, states)


class Ledger:
    """What is stored of every trial. Reads the storage once, then keeps up in memory: Optuna's own
    queries copy every trial each time."""

    def __init__(self, study: Study, store: RunStore, sampler: GenomeSampler) -> None:
        self.proposals: dict[int, Proposal] = {}
        self.results: dict[int, dict[int, dict[str, Any]]] = {}
        """Per trial and rung a RungResult as JSON."""
        self.failures: dict[int, Failure] = {}
        self._sampler = sampler
        self._told: dict[int, TrialState] = {}
        """Trials that the storage holds as finished."""
        self._ids: list[int] = []
        """Optuna's ids by trial number."""
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        try:
            self._journal = RunJournal(store.journal_path) if study.storage is None else None
            self._storage: BaseStorage = (
                _Journal(self._journal)
                if self._journal is not None
                else optuna.storages.get_storage(study.storage)
            )
            self._study = optuna.create_study(
                study_name=study.name,
                storage=self._storage,
                sampler=sampler,
                directions=[g.objective.direction for g in study.goals],
                load_if_exists=True,
            )
        except (OSError, RunError):
            raise
        except Exception as error:
            where = study.storage or store.journal_path
            first = " ".join(str(error).split())[:200]
            raise RunError(f"{where}: the storage cannot be opened: {first}") from None
        self._study_id = self._storage.get_study_id_from_name(study.name)
        self._load()
        if not self._ids:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                self._study.set_metric_names([g.label for g in study.goals])

    def _load(self) -> None:
        for trial in self._storage.get_all_trials(self._study_id, deepcopy=False):
            number, attributes = trial.number, trial.user_attrs
            self._ids.append(
                self._storage.get_trial_id_from_study_id_trial_number(self._study_id, number)
            )
            if PROPOSAL in attributes:
                self.proposals[number] = Proposal.from_json(attributes[PROPOSAL])
            if FAILURE in attributes:
                self.failures[number] = Failure(**attributes[FAILURE])
            self.results[number] = {
                int(key.removeprefix(RUNG)): value
                for key, value in attributes.items()
                if key.startswith(RUNG)
            }
            if trial.state.is_finished():
                self._told[number] = trial.state

    def proposal(self, number: int) -> Proposal:
        """The stored proposal of a trial, or a new one, stored before it is returned.

        Numbers come in order. Raises Exhausted, and nothing is stored then."""
        if number in self.proposals:
            return self.proposals[number]
        self._sampler.prepare(number)
        if number < len(self._ids):
            # A kill came between Optuna's trial and our attribute.
            trial = Trial(self._study, self._ids[number])
        else:
            trial = self._study.ask()
            self._ids.append(trial._trial_id)
        if trial.number != number:
            raise RunError(
                f"{self._study.study_name}: trial {trial.number} came from elsewhere: "
                "the storage has another writer"
            )
        proposal = self._sampler.take(number)
        there = trial.constraints if proposal.constraints else {}
        for name, exceeded in proposal.constraints.items():
            if name not in there:
                trial.set_constraint(name, exceeded)
        self._set(number, PROPOSAL, proposal.as_json())
        self.proposals[number] = proposal
        return proposal

    def keep_result(self, number: int, rung: int, result: dict[str, Any]) -> None:
        """Store a rung's result; from here on it is never computed again."""
        # What readers get back is what JSON gives: keys are strings, tuples are lists.
        self.results.setdefault(number, {})[rung] = json.loads(json.dumps(result))
        self._set(number, f"{RUNG}{rung}", result)

    def keep_failure(self, number: int, failure: Failure) -> None:
        """Store why a trial failed."""
        self.failures[number] = failure
        self._set(number, FAILURE, asdict(failure))

    def tell(self, number: int, state: RecordState, values: Sequence[float] | None = None) -> None:
        """Finish a trial in Optuna's storage, once."""
        if number in self._told:
            return
        self._study.tell(number, values, _STATES[state])
        self._told[number] = _STATES[state]

    def is_complete(self, number: int) -> bool:
        return self._told.get(number) == TrialState.COMPLETE

    def was_stopped(self, number: int) -> bool:
        """Whether the storage holds the trial as stopped, which cannot be taken back."""
        return self._told.get(number) == TrialState.PRUNED

    def close(self) -> None:
        """Give the storage back."""
        if self._journal is not None:
            self._journal.close()

    def _set(self, number: int, key: str, value: Any) -> None:
        self._storage.set_trial_user_attr(self._ids[number], key, value)
