"""Lanes (worker threads): results in the order of the jobs, ordered turns, errors, and thread settings restored."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch

from crosscal.lanes import OrderedTurns, WriteBehind, each_side_by_side, side_by_side


@pytest.fixture(params=[1, 2, 3, 8, 16])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def threads_of_a_new_thread() -> int:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(torch.get_num_threads).result()


def test_results_come_in_the_order_of_the_jobs(threads: int) -> None:
    def job(number: int) -> int:
        time.sleep(0.002 * (number % 3))
        return number

    assert side_by_side([partial(job, number) for number in range(20)]) == list(range(20))
    assert side_by_side([]) == []
    assert side_by_side([], threads_each=1) == []


@pytest.mark.parametrize("most", [None, 1, 3])
@pytest.mark.parametrize("threads_each", [None, 1])
def test_lanes_share_the_threads_out_and_give_them_back(
    threads: int, most: int | None, threads_each: int | None
) -> None:
    lanes = min(threads, most or threads)
    meeting = threading.Barrier(lanes)

    def job() -> tuple[int, bool, int]:
        meeting.wait(timeout=30)  # passes only if all lanes run at once
        return torch.get_num_threads(), torch.is_grad_enabled(), threads_of_a_new_thread()

    with torch.no_grad():
        seen = side_by_side([job] * (2 * lanes), most=most, threads_each=threads_each)
    assert set(seen) == {(threads_each or threads // lanes, False, threads)}
    assert torch.get_num_threads() == threads_of_a_new_thread() == threads


def test_a_job_alone_has_one_thread_where_it_is_to_have_one(threads: int) -> None:
    assert side_by_side([torch.get_num_threads], threads_each=1) == [1]
    assert side_by_side([torch.get_num_threads]) == [threads]


def test_nested_lanes_split_their_thread_share() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(8)
    try:
        found = side_by_side([partial(side_by_side, [torch.get_num_threads] * 3)] * 2)
    finally:
        torch.set_num_threads(before)
    assert found == [[4 // 3] * 3] * 2


def test_several_threads_work_in_lanes_at_once_each_with_its_own_number() -> None:
    usual = threads_of_a_new_thread()
    meeting = threading.Barrier(4)

    def outer(threads: int) -> None:
        torch.get_num_threads()  # in a new thread, torch ignores a number that is set before the first query
        for _ in range(10):
            torch.set_num_threads(threads)
            meeting.wait(timeout=30)
            assert side_by_side([torch.get_num_threads] * 4, most=2) == [threads // 2] * 4
            assert side_by_side([torch.get_num_threads] * 4, threads_each=1) == [1] * 4
            assert torch.get_num_threads() == threads

    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(outer, (2, 4, 6, 8)))
        # By torch's own rule, new threads get the number that one of the callers set; never that of a lane.
        assert threads_of_a_new_thread() in (2, 4, 6, 8)
    finally:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(torch.set_num_threads, usual).result()


def test_once_a_job_has_failed_no_further_one_starts(threads: int) -> None:
    """All lanes but one wait while the job of the last one fails."""
    started: list[int] = []
    has_failed = threading.Event()

    def job(number: int) -> None:
        started.append(number)
        if number == threads - 1:
            threading.Timer(0.2, has_failed.set).start()  # enough time for the lane to start another job
            raise ValueError(f"job {number}")
        assert has_failed.wait(timeout=30)

    with pytest.raises(ValueError, match=f"job {threads - 1}"):
        side_by_side([partial(job, number) for number in range(100)])
    assert sorted(started) == list(range(threads))
    assert torch.get_num_threads() == threads_of_a_new_thread() == threads


def test_nothing_starts_once_the_caller_has_left(threads: int) -> None:
    started: list[int] = []
    goes_on = threading.Event()

    def job(number: int) -> None:
        started.append(number)
        assert number == 0 or goes_on.wait(timeout=30)

    results = each_side_by_side([partial(job, number) for number in range(100)])
    next(results)
    threading.Timer(0.2, goes_on.set).start()
    results.close()
    assert len(started) <= threads + 1


def test_a_failing_job_leaves_nobody_waiting_for_its_turn(threads: int) -> None:
    for failing in range(20):
        turns = OrderedTurns()

        def job(number: int, turns: OrderedTurns = turns, failing: int = failing) -> None:
            with turns.job(number), turns.turn("sum", number):
                if number == failing:
                    raise ValueError("mine")

        with pytest.raises(ValueError, match="mine"):
            side_by_side([partial(job, number) for number in range(40)])


def test_turns_are_taken_in_order_and_nobody_waits_for_who_does_not_come(threads: int) -> None:
    turns, taken = OrderedTurns(), list[int]()

    def job(number: int) -> None:
        with turns.job(number):
            time.sleep(0.001 * ((7 * number) % 5))
            if number % 4 == 2:
                return  # a batch that never reaches the sum
            with turns.turn("sum", number):
                taken.append(number)

    side_by_side([partial(job, number) for number in range(40)])
    assert taken == [number for number in range(40) if number % 4 != 2]


def test_what_is_handed_over_is_done_in_order_and_all_of_it() -> None:
    done: list[int] = []

    def job(number: int) -> None:
        time.sleep(0.003)
        done.append(number)

    with WriteBehind() as behind:
        for number in range(5):
            behind.hand_over(partial(job, number))
            assert len(done) >= number  # at most one behind
    assert done == list(range(5))


def test_what_fails_behind_is_raised_at_the_next_meeting() -> None:
    def fail() -> None:
        raise ValueError("behind")

    with pytest.raises(ValueError, match="behind"), WriteBehind() as behind:
        behind.hand_over(fail)
    behind, begun = WriteBehind(), list[int]()
    behind.hand_over(fail)
    with pytest.raises(ValueError, match="behind"):
        behind.hand_over(lambda: begun.append(1))
    assert not begun


def test_error_of_the_caller_wins_over_background_error() -> None:
    done: list[int] = []

    def fail() -> None:
        done.append(1)
        raise ValueError("behind")

    def work() -> None:
        with WriteBehind() as behind:
            behind.hand_over(fail)
            raise KeyError("at hand")

    with pytest.raises(KeyError, match="at hand"):
        work()
    assert done  # the job that had begun was waited for
