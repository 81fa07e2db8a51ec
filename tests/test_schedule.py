"""Halving in virtual time: the same decisions whatever the order in which real workers finish."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mendel.search.pareto import as_losses, order
from mendel.search.schedule import Job, Propose, Schedule


def losses_of(job: Job) -> tuple[float, float]:
    rng = np.random.default_rng((job.trial, job.rung))
    return float(rng.random()), float(rng.random())


def replay(schedule: Schedule, fails: set[int], infeasible: set[int]) -> list[object]:
    """Run with every result known at once; the story of all that was decided."""
    story: list[object] = []
    numbers = itertools.count()
    while True:
        while (action := schedule.decide()) is not None:
            if isinstance(action, Propose):
                number = next(numbers)
                if number in infeasible:
                    schedule.reject()
                    story.append(("infeasible", number))
                    continue
                action = schedule.start(number)
            story.append(action)
        job = schedule.due()
        if job is None:
            return [*story, ("waiting", schedule.waiting())]
        stopped = schedule.finish(job, None if job.trial in fails else losses_of(job))
        story.append(("ended", job, stopped))


def with_workers(
    schedule: Schedule, workers: int, fails: set[int], seconds: dict[Job, float]
) -> list[object]:
    """The same with real workers whose jobs take `seconds`: the caller waits for the due job."""
    story: list[object] = []
    numbers = itertools.count()
    queue: list[Job] = []
    busy: list[tuple[float, Job]] = []
    done: set[Job] = set()
    clock = 0.0
    while True:
        while (action := schedule.decide()) is not None:
            if isinstance(action, Propose):
                action = schedule.start(next(numbers))
            story.append(action)
            queue.append(action)
        job = schedule.due()
        if job is None:
            return [*story, ("waiting", schedule.waiting())]
        while job not in done:
            while queue and len(busy) < workers:
                begun = queue.pop(0)
                busy.append((clock + seconds.get(begun, 1.0), begun))
            busy.sort()
            clock, ended = busy.pop(0)
            done.add(ended)
        stopped = schedule.finish(job, None if job.trial in fails else losses_of(job))
        story.append(("ended", job, stopped))


def make(trials: int = 27, in_flight: int = 4, baselines: int = 2, patience: int = 6) -> Schedule:
    return Schedule(
        trials=trials,
        ends=[0.2, 0.5, 1.0],
        eta=3,
        in_flight=in_flight,
        patience=patience,
        baselines=baselines,
    )


@settings(max_examples=60, deadline=None)
@given(
    workers=st.integers(1, 9),
    in_flight=st.integers(1, 7),
    fails=st.sets(st.integers(0, 28), max_size=5),
    times=st.lists(st.floats(0.01, 50), min_size=40, max_size=40),
)
def test_real_time_decides_nothing(
    workers: int, in_flight: int, fails: set[int], times: list[float]
) -> None:
    jobs = [Job(t, r) for r in range(3) for t in range(29)]
    seconds = dict(zip(jobs, itertools.cycle(times), strict=False))
    expected = replay(make(in_flight=in_flight), fails, set())
    assert with_workers(make(in_flight=in_flight), workers, fails, seconds) == expected


def test_every_trial_ends_once() -> None:
    story = replay(make(), fails={3, 5}, infeasible={6, 9})
    started = [a.trial for a in story if isinstance(a, Job) and a.rung == 0]
    assert len(started) == len(set(started)) == 29
    top = {a.trial for a in story if isinstance(a, Job) and a.rung == 2}
    stopped = [t for e in story if isinstance(e, tuple) and e[0] == "ended" for t in e[2]]
    waiting = story[-1][1]  # type: ignore[index]
    ends = Counter([*stopped, *waiting, *top, 3, 5])
    assert set(ends) == set(started)
    assert set(ends.values()) == {1}


def test_about_one_in_eta_goes_on() -> None:
    story = replay(make(trials=810, baselines=0, in_flight=9, patience=900), set(), set())
    count = Counter(a.rung for a in story if isinstance(a, Job))
    assert count[0] == 810
    # Those that were ahead when they were promoted, and fell behind later, come on top:
    # asynchronous halving never takes a promotion back.
    assert 270 <= count[1] <= 1.5 * 270
    assert count[1] // 3 <= count[2] <= 1.5 * count[1] / 3


@pytest.mark.parametrize("in_flight", [1, 7, 30])
def test_without_early_stops_the_whole_best_part_goes_on(in_flight: int) -> None:
    # Asynchronous halving promotes at least what synchronous halving would.
    schedule = Schedule(trials=30, ends=[0.5, 1.0], eta=3, in_flight=in_flight, patience=1000)
    story = replay(schedule, set(), set())
    ranked = order(as_losses([losses_of(Job(t, 0)) for t in range(30)]))
    promoted = {a.trial for a in story if isinstance(a, Job) and a.rung == 1}
    assert {int(t) for t in ranked[:10]} <= promoted


def test_patience_bounds_who_waits() -> None:
    patient = make(trials=200, baselines=0, in_flight=1, patience=12)
    numbers, most = itertools.count(), 0
    while True:
        while (action := patient.decide()) is not None:
            if isinstance(action, Propose):
                patient.start(next(numbers))
        job = patient.due()
        if job is None:
            break
        patient.finish(job, losses_of(job))
        most = max(most, len(patient.waiting()))
    # Per rung: those whose patience lasts, one judgement late, and those about to go on.
    assert most <= 2 * (12 + 3 + 3)


def test_baselines_run_first_and_through_every_rung() -> None:
    story = replay(make(trials=3, baselines=2), set(), set())
    jobs = [a for a in story if isinstance(a, Job)]
    assert jobs[:2] == [Job(0, 0), Job(1, 0)]
    for trial in (0, 1):
        assert [j.rung for j in jobs if j.trial == trial] == [0, 1, 2]


def test_a_short_search_ends_with_a_trained_candidate() -> None:
    story = replay(make(trials=2, baselines=0), set(), set())
    assert sum(isinstance(a, Job) and a.rung == 2 for a in story) == 1


def test_an_exhausted_space_ends_the_search() -> None:
    schedule = make(trials=10, baselines=0)
    for number in range(3):
        assert isinstance(schedule.decide(), Propose)
        schedule.start(number)
    assert isinstance(schedule.decide(), Propose)
    schedule.exhaust()
    while (job := schedule.due()) is not None:
        schedule.finish(job, losses_of(job))
        while isinstance(action := schedule.decide(), Job):
            assert action.trial < 3
        assert action is None


def test_in_flight_is_kept() -> None:
    schedule = make(in_flight=3)
    numbers = itertools.count()
    while True:
        while (action := schedule.decide()) is not None:
            if isinstance(action, Propose):
                schedule.start(next(numbers))
        assert len(schedule.running()) <= 3
        job = schedule.due()
        if job is None:
            break
        schedule.finish(job, losses_of(job))
    assert math.isclose(schedule.work_left(), 0.0, abs_tol=3.0)


def test_more_trials_begin_with_the_same_ones() -> None:
    few = [a for a in replay(make(trials=12), set(), set()) if isinstance(a, Job)]
    many = [a for a in replay(make(trials=40), set(), set()) if isinstance(a, Job)]
    # Until the shorter search has nothing left to propose.
    last = max(i for i, a in enumerate(few) if a.rung == 0)
    assert many[: last + 1] == few[: last + 1]


@pytest.mark.parametrize(
    ("change", "words"),
    [({"ends": [0.5, 0.5]}, "increase"), ({"eta": 1}, "eta"), ({"in_flight": 0}, "in_flight")],
)
def test_nonsense_is_refused(change: dict[str, object], words: str) -> None:
    good: dict[str, object] = {
        "trials": 1,
        "ends": [1.0],
        "eta": 2,
        "in_flight": 1,
        "patience": 1,
    }
    with pytest.raises(ValueError, match=words):
        Schedule(**{**good, **change})  # type: ignore[arg-type]
