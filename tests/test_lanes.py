"""Lanes: results in their order, whatever the order they are done in; turns; errors; no trace of them afterwards."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from threadpoolctl import threadpool_info

from crosscal.lanes import MOST_LANES, Behind, Turns, side_by_side


@pytest.fixture(params=[1, 2, 3, 9])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_results_come_in_the_order_of_the_jobs(threads: int) -> None:
    def job(number: int) -> int:
        time.sleep(0.002 * (number % 3))
        return number

    assert side_by_side([partial(job, number) for number in range(20)]) == list(range(20))
    assert side_by_side([]) == []


def test_lanes_share_the_threads_out_and_give_them_back(threads: int) -> None:
    meeting = threading.Barrier(min(threads, MOST_LANES))

    def job() -> tuple[int, bool, int]:
        meeting.wait(timeout=30)  # passes only when all lanes are there at once
        blas = max((pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"), default=1)
        return torch.get_num_threads(), torch.is_grad_enabled(), blas

    lanes = min(threads, MOST_LANES)
    with torch.no_grad():
        seen = side_by_side([job] * (2 * lanes))
    assert {(own, wants) for own, wants, _ in seen} == {(threads // lanes, False)}
    if lanes > 1:
        assert max(blas for _, _, blas in seen) <= threads // lanes
    assert torch.get_num_threads() == threads
    thread_of_later: list[int] = []
    later = threading.Thread(target=lambda: thread_of_later.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert thread_of_later == [threads]


def test_the_first_error_is_raised_and_no_further_job_starts(threads: int) -> None:
    started: list[int] = []

    def job(number: int) -> None:
        started.append(number)
        if number == 1:
            raise ValueError(f"job {number}")
        time.sleep(0.01)

    with pytest.raises(ValueError, match="job 1"):
        side_by_side([partial(job, number) for number in range(100)])
    assert len(started) < 50
    assert torch.get_num_threads() == threads


def test_turns_are_taken_in_order_and_nobody_waits_for_who_does_not_come(threads: int) -> None:
    turns, taken = Turns(), list[int]()

    def job(number: int) -> None:
        with turns.job(number):
            time.sleep(0.001 * ((7 * number) % 5))
            if number % 4 == 2:
                return  # a batch that never reaches the sum
            with turns.turn("sum", number):
                taken.append(number)

    side_by_side([partial(job, number) for number in range(40)])
    assert taken == [number for number in range(40) if number % 4 != 2]


def test_a_job_that_fails_in_its_turn_blocks_nobody(threads: int) -> None:
    turns = Turns()

    def job(number: int) -> None:
        with turns.job(number), turns.turn("sum", number):
            if number == 3:
                raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        side_by_side([partial(job, number) for number in range(8)])


def test_what_is_handed_over_is_done_in_order_and_all_of_it() -> None:
    done: list[int] = []

    def job(number: int) -> None:
        time.sleep(0.003)
        done.append(number)

    with Behind() as behind:
        for number in range(5):
            behind.hand_over(partial(job, number))
            assert len(done) >= number  # at most one behind
    assert done == list(range(5))


def test_what_fails_behind_is_raised_at_the_next_meeting() -> None:
    def fail() -> None:
        raise ValueError("behind")

    with pytest.raises(ValueError, match="behind"), Behind() as behind:
        behind.hand_over(fail)
    behind, begun = Behind(), list[int]()
    behind.hand_over(fail)
    with pytest.raises(ValueError, match="behind"):
        behind.hand_over(lambda: begun.append(1))
    assert not begun


def test_an_error_at_hand_is_not_replaced_by_one_behind() -> None:
    done: list[int] = []

    def fail() -> None:
        done.append(1)
        raise ValueError("behind")

    def work() -> None:
        with Behind() as behind:
            behind.hand_over(fail)
            raise KeyError("at hand")

    with pytest.raises(KeyError, match="at hand"):
        work()
    assert done  # and what was begun was waited for
