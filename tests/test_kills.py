"""Runs that are killed with SIGKILL end in the bytes of a run that was not: adapter, every loss, and summary."""

from __future__ import annotations

from dataclasses import replace

import pytest
from kills import Job, Kill, changes_of, compare, finish, make_jobs, outcome


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Job, int]]:
    jobs = make_jobs(tmp_path_factory.mktemp("plain"), dev=False)
    return {variant: (job, changes_of(job)) for variant, job in jobs.items()}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Job, int]]:
    jobs = make_jobs(tmp_path_factory.mktemp("stopped"), dev=True)
    return {variant: (job, changes_of(job)) for variant, job in jobs.items()}


def killed(whole: Job, name: str, *kills: Kill) -> int:
    job = replace(whole, output=whole.output.with_name(f"{whole.output.name}-{name}"))
    count = finish(job, kills)
    compare(whole, job)
    return count


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["fa", "fb"])
def test_killed_in_the_middle(plain: dict[str, tuple[Job, int]], variant: str) -> None:
    """At a moment of its own each time, and while a checkpoint is written."""
    whole, changes = plain[variant]
    assert changes > 30
    assert killed(whole, "a", Kill(seconds=0.05), Kill(change=changes // 2), Kill(change=changes // 3)) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["fa", "fb"])
def test_killed_with_dev_rows_and_patience(stopped: dict[str, tuple[Job, int]], variant: str) -> None:
    whole, changes = stopped[variant]
    summary = outcome(whole)[2]
    assert 0 < summary["best_step"] < summary["steps"] < whole.recipe.training.max_steps  # it did stop early
    assert killed(whole, "a", Kill(change=changes // 3), Kill(change=changes // 4), Kill(seconds=0.02)) >= 2


@pytest.mark.slow
def test_killed_after_the_last_step(plain: dict[str, tuple[Job, int]], stopped: dict[str, tuple[Job, int]]) -> None:
    """While the adapter is published, and while the run's folder is removed after that."""
    for whole, changes in (plain["fa"], stopped["fb"]):
        for before_the_end in (1, 12):
            assert killed(whole, f"end-{before_the_end}", Kill(change=changes - before_the_end)) == 1
