"""The position of a run survives JSON."""

import json

from peft_bituning.training.resumable import RunningMeans, TrainingState


def test_round_trip() -> None:
    state = TrainingState(stage=2, epoch=1, update=3, global_step=17, best_metric=0.1 + 0.2, expert_rows=[3, 4])
    state.since_log.add({"loss": 1 / 3})
    state.since_log.add({"loss": 0.5})
    again = TrainingState.from_dict(json.loads(json.dumps(state.to_dict())))
    assert again == state
    assert again.since_log.means() == {"loss": (1 / 3 + 0.5) / 2}


def test_means_of_nothing() -> None:
    assert RunningMeans().means() == {}
