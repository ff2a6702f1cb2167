"""Who is to blame for a hang, from made-up positions of ranks."""

from dataclasses import replace

import pytest

from pipeline.hang_report import Position, judge, ranks_text

GROUP = "default_pg 0"


def waiting(rank: int, **changes) -> Position:
    """A rank that waits in the all-reduce of step 7."""
    position = Position(
        rank=rank, host=f"n{rank}", phase="step", step=7, seconds=60.0, place="pipeline/learner.py:157 _sum",
        collective=f"all_reduce 20 of group {GROUP}", called={GROUP: 20},
    )  # fmt: skip
    return replace(position, **changes)


def reading(rank: int) -> Position:
    return waiting(rank, place="pipeline/data/chunks.py:88 read", collective=None, called={GROUP: 19})


def test_a_rank_that_has_not_come_to_the_collective():
    verdict = judge([waiting(0), waiting(1), reading(2), waiting(3)])
    assert verdict.stuck == (2,)
    assert verdict.summary == (
        "rank 2 on n2 at pipeline/data/chunks.py:88 read (step 7); the others wait in all_reduce 20 of group "
        "default_pg 0"
    )
    assert verdict.text.splitlines()[1:] == [
        "waiting: ranks 0-1, 3 in all_reduce 20 of group default_pg 0, pipeline/learner.py:157 _sum (step 7)"
    ]


def test_silent_ranks_come_first():
    verdict = judge([waiting(0), None, reading(2), None])
    assert verdict.stuck == (1, 3)
    assert verdict.summary.startswith("ranks 1, 3 left no report: stopped, gone, or its machine is unreachable; the ")


def test_a_rank_that_is_behind_because_it_waits_for_another_is_a_victim():
    # A pipeline: rank 1 waits for rank 0's activations and is as far behind in the default group.
    first = waiting(0, collective=None, place="pipeline/engine.py:100 _run", called={GROUP: 19, "pp": 5})
    second = waiting(1, collective="recv 6 of group pp", called={GROUP: 19, "pp": 6})
    assert judge([first, second, waiting(2)]).stuck == (0,)


def test_without_a_flight_recorder_the_place_decides():
    positions = [waiting(0, called={}), replace(reading(1), called={}), waiting(2, called={})]
    assert judge(positions).stuck == (1,)


def test_nobody_in_particular():
    verdict = judge([waiting(0), waiting(1)])
    assert verdict.stuck == ()
    assert verdict.summary.startswith("nobody in particular; all ranks wait, which points to the network")


def test_everybody_outside_of_collectives_is_nobody_in_particular():
    assert judge([replace(reading(rank), called={}) for rank in (0, 1)]).stuck == ()


@pytest.mark.parametrize(("ranks", "text"), [((3,), "rank 3"), ((0, 1, 2, 5), "ranks 0-2, 5"), ((7, 5), "ranks 5, 7")])
def test_ranks_text(ranks, text):
    assert ranks_text(ranks) == text
