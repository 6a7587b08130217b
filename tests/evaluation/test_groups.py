"""Groups of test users, against loops over events."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from peft_bituning.data import LeaveOneOut
from peft_bituning.evaluation import RankingReport, user_groups
from peft_bituning.evaluation.groups import RARE, SHORT

HELD_OUT, NEVER, RARELY, FEW = (
    "items held out",
    "items never bought",
    f"items bought 1 to {RARE} times",
    f"users with up to {SHORT} events",
)


@given(
    st.lists(st.lists(st.integers(0, 7), max_size=9), max_size=12),
    st.sets(st.integers(0, 7), max_size=4),
    st.one_of(st.none(), st.sets(st.integers(0, 11))),
)
def test_groups_are_those_of_loops(
    histories: list[list[int]], held_out: set[int], training_users: set[int] | None
) -> None:
    split = LeaveOneOut(histories, training_users, held_out)
    samples = split.samples("test")
    groups = user_groups(split, samples)
    assert list(groups) == [HELD_OUT, NEVER, RARELY, FEW]
    tested = {sample.user for sample in samples}
    for place, sample in enumerate(samples):
        times = 0
        for user, history in enumerate(histories):
            if user in tested:
                known = history[:-1]
            elif training_users is not None and user not in training_users:
                known = []
            else:
                known = history if len(history) < 3 else history[:-2]
            for item in known:
                times += item == sample.target and item not in held_out
        events = [item for item in histories[sample.user][:-1] if item not in held_out]
        assert groups[HELD_OUT][place] == (sample.target in held_out)
        assert groups[NEVER][place] == (times == 0)
        assert groups[RARELY][place] == (1 <= times <= 5)
        assert groups[FEW][place] == (len(events) <= 3)
    assert all(mask.shape == (len(samples),) for mask in groups.values())
    assert all(mask.dtype == bool for mask in groups.values()) or not samples


def test_groups_of_nobody_are_masks_too() -> None:
    groups = user_groups(LeaveOneOut([(0, 1)]), [])
    assert [(mask.dtype, mask.shape) for mask in groups.values()] == [(np.dtype(bool), (0,))] * 4


def test_an_example() -> None:
    # item 9 is held out, 8 is in nobody's history but a target, 1 is bought often
    histories = [(0, 9, 1, 9), (1, 2, 1, 2, 8), (1, 1, 1, 1, 2), (2, 3, 4, 1)]
    split = LeaveOneOut(histories, held_out_items=[9])
    samples = split.samples("test")
    groups = user_groups(split, samples)
    assert [sample.target for sample in samples] == [9, 8, 2, 1]
    assert groups[HELD_OUT].tolist() == [True, False, False, False]
    assert groups[NEVER].tolist() == [True, True, False, False]
    assert groups[RARELY].tolist() == [False, False, True, False]  # 2 three times, 1 seven times
    assert groups[FEW].tolist() == [True, False, False, True]


def test_metrics_of_groups_are_those_of_their_users() -> None:
    ranks = np.array([1.0, 3.0, 12.0, 2.0])
    report = RankingReport(ranks, ranks + 1)
    some = np.array([True, False, True, False])
    found = report.metrics({"some": some, "nobody": np.zeros(4, bool), "all": np.ones(4, bool)})
    assert found["groups"].keys() == {"some", "all"}
    assert found["groups"]["some"] == RankingReport(ranks[some], ranks[some] + 1).metrics()
    assert found["groups"]["some"]["users"] == 2
    whole = report.metrics()
    assert found["groups"]["all"] == whole and "groups" not in whole
    assert {key: value for key, value in found.items() if key != "groups"} == whole
    assert report.metrics({})["groups"] == {}


def test_a_report_of_some_users_keeps_its_length_of_list() -> None:
    report = RankingReport(np.array([1.0, 4.0]), np.array([1.0, 4.0]), k=3)
    assert report.of(np.array([False, True])).k == 3
    groups = report.metrics({"second": np.array([False, True])})["groups"]
    assert groups["second"]["unfiltered"]["recall@3"] == 0
