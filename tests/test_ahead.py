"""Work done ahead by threads: in order, bounded, and over when it is closed."""

from __future__ import annotations

import threading
import time
from contextlib import closing
from itertools import count, islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patch_retriever.ahead import made_ahead


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 6), st.none() | st.integers(1, 9))
@settings(deadline=None, max_examples=40)
def test_what_is_made_comes_in_the_order_of_the_inputs(delays, workers, ahead):
    def make(numbered):
        number, delay = numbered
        time.sleep(delay / 2000)  # so that later ones are often done first
        return number

    found = list(made_ahead(make, enumerate(delays), workers, ahead))
    assert found == list(range(len(delays)))
    assert threads() == []


def test_what_is_made_may_be_none_or_an_exception():
    items = [None, StopIteration(), ValueError("a value"), None]
    assert list(made_ahead(lambda item: item, items, 2)) == items


def test_several_are_made_at_once():
    together = threading.Barrier(3, timeout=5)
    assert len(list(made_ahead(lambda _: together.wait(), range(6), workers=3))) == 6


@pytest.mark.parametrize("workers", [1, 3])
def test_an_error_of_a_thread_comes_after_what_was_made_before_it(workers):
    error = OSError("the disk is gone")

    def make(number):
        if number == 3:
            raise error
        return number

    found = []
    with pytest.raises(OSError, match="the disk is gone") as caught:
        for item in made_ahead(make, count(), workers):
            found.append(item)
    assert found == [0, 1, 2]
    assert caught.value is error
    assert threads() == []


def test_an_error_of_the_inputs_comes_after_what_was_made_before_it():
    def inputs():
        yield from (1, 2, 3)
        raise OSError("the disk is gone")

    found = []
    with pytest.raises(OSError, match="the disk is gone"):
        for item in made_ahead(lambda number: 2 * number, inputs(), workers=2, ahead=8):
            found.append(item)
    assert found == [2, 4, 6]
    assert threads() == []


def test_inputs_are_drawn_where_the_results_are_read():
    drawn_by = []

    def inputs():
        for number in range(10):
            drawn_by.append(threading.current_thread())
            yield number

    made_by = set(made_ahead(lambda _: threading.current_thread(), inputs(), 2))
    assert set(drawn_by) == {threading.current_thread()}
    assert threading.current_thread() not in made_by


@pytest.mark.parametrize("taken", [1, 2, 5])
def test_closing_early_leaves_no_thread(taken):
    made = made_ahead(lambda number: number, count(), workers=2)
    assert list(islice(made, taken)) == list(range(taken))
    assert threads()
    made.close()
    assert threads() == []


def test_closing_waits_for_what_is_being_made_and_begins_nothing_more():
    begun, done = [], []

    def slow(number):
        begun.append(number)
        time.sleep(0.05 if number else 0)
        done.append(number)
        return number

    made = made_ahead(slow, count(), workers=1, ahead=4)
    assert next(made) == 0
    made.close()
    assert begun == done
    assert len(begun) <= 3
    assert threads() == []


def test_a_reader_that_fails_leaves_no_thread():
    with (
        pytest.raises(ZeroDivisionError),
        closing(made_ahead(lambda number: number, count())) as made,
    ):
        for _ in made:
            raise ZeroDivisionError
    assert threads() == []


def test_nobody_reads_and_nothing_is_drawn():
    drawn = []
    with closing(made_ahead(lambda number: number, (drawn.append(i) for i in count()))):
        assert threads() == []
        assert drawn == []


@pytest.mark.parametrize(("workers", "ahead"), [(1, None), (3, None), (1, 5), (3, 5)])
def test_no_more_than_that_is_made_ahead(workers, ahead):
    made = []
    bound = ahead or workers
    stream = made_ahead(made.append, count(), workers, ahead)
    for i in range(4):
        next(stream)
        time.sleep(0.02)
        assert len(made) <= i + 1 + bound + 1
    assert len(made) > bound
    stream.close()
