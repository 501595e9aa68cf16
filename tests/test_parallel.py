"""The door to Ray on one machine: results, errors, deaths and what does not fit. Deaths of nodes: ``make test-ray``."""

import pytest

from data_registry.errors import InputError
from pipelines.parallel import _refuse_what_fits_nowhere, run_bounded

GB = 10**9


def test_results_errors_and_deaths():
    asked = []

    def work(number: int, attempt: int) -> int:
        import os

        if number == 1 and attempt < 2 or number == 3:
            os._exit(1)
        if number == 2:
            raise InputError("two")
        return 10 * number + attempt

    def again(index: int, death: str) -> tuple | None:
        asked.append((index, death))
        attempt = sum(index == other for other, _ in asked)
        return (index, attempt) if index == 1 or attempt < 2 else None

    items = [(number, 0) for number in range(5)]
    results = dict(run_bounded(work, items, memory=[GB // 100] * 5, again=again, workers=2, address=None))
    assert {index: results[index] for index in (0, 1, 4)} == {0: 0, 1: 12, 4: 40}
    assert isinstance(results[2], InputError) and str(results[2]) == "two"
    assert isinstance(results[3], Exception) and "died" in str(results[3])
    assert sorted(asked) == [(1, "worker"), (1, "worker"), (3, "worker"), (3, "worker")]


def test_what_fits_nowhere_is_one_line():
    with pytest.raises(InputError, match=r"^a task needs 90000\.00 GB and the largest node offers \d+\.\d\d; .*resources\.task_gb"):
        next(run_bounded(lambda value: value, [(1,)], memory=[90_000 * GB], again=lambda *_: None, workers=1, address=None))


def test_more_threads_than_any_node_has_are_one_line():
    _refuse_what_fits_nowhere(GB, 4, {"a": (2, 2 * GB), "b": (4, GB)})
    _refuse_what_fits_nowhere(GB, 4, {})                                       # an autoscaler's first node is still to come
    with pytest.raises(InputError, match=r"^a task needs 5 CPUs and the largest node offers 4; fewer threads, or more \(resources\.workers\)"):
        _refuse_what_fits_nowhere(GB, 5, {"a": (2, 2 * GB), "b": (4, GB)})


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("http://127.0.0.1:8265", "is a dashboard's; `ray job submit --address http://127.0.0.1:8265`"),
        ("127.0.0.1:1", "Ray cluster 127.0.0.1:1 cannot be joined ([Errno 111] Connection refused)"),
    ],
)
def test_an_address_that_is_none_is_one_line(address, words):
    with pytest.raises(InputError) as caught:
        next(run_bounded(lambda value: value, [(1,)], memory=[1], again=lambda *_: None, workers=1, address=address))
    assert words in str(caught.value) and "\n" not in str(caught.value)
