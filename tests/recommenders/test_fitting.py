"""Training: both models learn a deterministic cycle, runs repeat, the best epoch is kept, bad losses stop."""

from dataclasses import dataclass

import pytest
import torch

from peft_bituning.errors import ConfigurationError, DataError, NonFiniteLossError
from peft_bituning.metrics import ranking_metrics, target_ranks
from peft_bituning.recommenders import (
    build_recommender,
    default_fit_arguments,
    fit_recommender,
    fitting,
    pad_histories,
    validation_ndcg,
)

NUM_ITEMS = 12
kinds = pytest.mark.parametrize("kind", ["sasrec", "bert4rec"])


@dataclass(frozen=True)
class Row:
    history: tuple[int, ...]
    target: int


def cycle(start, length):
    return [(start + step) % NUM_ITEMS for step in range(length)]


SEQUENCES = [cycle(start, length) for start in range(NUM_ITEMS) for length in (3, 5, 8)]
VALID = [Row(tuple(cycle(start, 4)), (start + 4) % NUM_ITEMS) for start in range(NUM_ITEMS)]


def build(kind, **settings):
    return build_recommender(
        kind, NUM_ITEMS, **{"hidden_size": 16, "max_history_length": 8, "dropout": 0.0, **settings}
    )


@kinds
def test_a_cycle_is_learned(kind):
    model = build(kind, hidden_size=32, num_hidden_layers=1, attention_dropout=0.0, initializer_range=0.1)
    sequences = [cycle(start, length) for start in range(NUM_ITEMS) for length in range(2, 9)]
    valid = [
        Row(tuple(cycle(start, length)), (start + length) % NUM_ITEMS) for start in range(12) for length in (1, 4, 7)
    ]
    report = fit_recommender(model, sequences, valid, epochs=60, batch_size=12, learning_rate=3e-3, patience=60)
    for length in (2, 5, 8):
        test = [cycle(start, length) for start in range(NUM_ITEMS)]
        scores = model.scores(*pad_histories([row[:-1] for row in test]))
        ranks = target_ranks(scores, [row[-1] for row in test])
        assert ranking_metrics(ranks, k=1)["recall@1"] > 0.9
    assert report.losses[-1] < report.losses[0] / 3
    assert report.best_ndcg == validation_ndcg(model, valid) == report.valid_ndcg[report.best_epoch]
    assert not model.training and report.seconds > 0


@kinds
def test_a_seed_decides_all(kind):
    hashes, losses = [], []
    for seed in (1, 1, 2):
        torch.rand(3)  # the global state must not matter
        model = build(kind, dropout=0.3)
        losses.append(fit_recommender(model, SEQUENCES, VALID, epochs=2, batch_size=8, seed=seed).losses)
        hashes.append(model.content_hash())
    assert hashes[0] == hashes[1] != hashes[2] and losses[0] == losses[1] != losses[2]


def test_the_global_random_state_is_left():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    fit_recommender(build("sasrec", dropout=0.3), SEQUENCES, epochs=1)
    assert torch.equal(torch.rand(1), expected)


def test_early_stopping_keeps_the_best_epoch():
    model = build("sasrec")
    wrong = [Row(row.history, (row.target + 5) % NUM_ITEMS) for row in VALID]  # learning makes these worse
    report = fit_recommender(model, SEQUENCES, wrong, epochs=200, batch_size=12, learning_rate=1e-2, patience=3)
    assert report.stopped_early and len(report.losses) == report.best_epoch + 3
    assert report.best_ndcg == max(report.valid_ndcg.values()) == validation_ndcg(model, wrong)


def test_validation_can_be_rarer_than_epochs():
    report = fit_recommender(build("sasrec"), SEQUENCES, VALID, epochs=5, validate_every=2)
    assert sorted(report.valid_ndcg) == [2, 4, 5]


def test_without_validation_the_last_epoch_is_kept():
    report = fit_recommender(build("sasrec"), SEQUENCES, epochs=3)
    assert report.best_epoch == 3 and report.best_ndcg is None and report.valid_ndcg == {}


def test_every_item_but_the_first_of_a_long_sequence_is_a_target_once():
    model = build("sasrec")  # windows of nine items
    seen = []
    original = model.training_loss

    def spy(rows, lengths, generator):
        seen.extend(row[1:length].tolist() for row, length in zip(rows, lengths, strict=True))
        return original(rows, lengths, generator)

    model.training_loss = spy
    fit_recommender(model, [list(range(NUM_ITEMS)), [3], []], epochs=1)
    assert sorted(item for row in seen for item in row) == list(range(1, NUM_ITEMS))


@pytest.mark.parametrize(("batch_size", "batch_positions"), [(4, 1000), (100, 20), (100, 1)])
def test_steps_keep_to_both_limits_and_see_every_row(batch_size, batch_positions):
    model = build("sasrec")
    shapes, original = [], model.training_loss

    def spy(rows, lengths, generator):
        shapes.append(tuple(rows.shape))
        return original(rows, lengths, generator)

    model.training_loss = spy
    fit_recommender(model, SEQUENCES, epochs=1, batch_size=batch_size, batch_positions=batch_positions)
    assert sum(rows for rows, _ in shapes) == len(SEQUENCES)
    assert all(rows <= batch_size and (rows == 1 or rows * width <= batch_positions) for rows, width in shapes)


@kinds
def test_a_loss_that_is_not_finite_stops_with_its_place_and_cause(kind):
    model = build(kind)
    with torch.no_grad():
        model.item_weights[0] = torch.nan
    with pytest.raises(
        NonFiniteLossError, match=r"nan in epoch 1, step 1 \(weights already not finite: \['encoder\.emb"
    ):
        fit_recommender(model, SEQUENCES, epochs=1, batch_size=64)


def test_bad_input_is_named():
    model = build("sasrec")
    with pytest.raises(DataError, match=r"training sequence 1 holds catalog indices \[12\] outside 0 to 11"):
        fit_recommender(model, [[0, 1], [1, 12]])
    with pytest.raises(DataError, match="no training sequence has 2 items or more, got 2 sequences"):
        fit_recommender(model, [[0], []])
    with pytest.raises(ConfigurationError, match="epochs must be at least 1, got 0"):
        fit_recommender(model, SEQUENCES, epochs=0)
    with pytest.raises(ConfigurationError, match="learning_rate must be above 0, got 0"):
        fit_recommender(model, SEQUENCES, learning_rate=0)


def test_default_arguments_are_accepted():
    for kind in ("sasrec", "bert4rec"):
        arguments = default_fit_arguments(kind)
        arguments["epochs"] = 1
        fit_recommender(build(kind), SEQUENCES, VALID, **arguments)
        assert default_fit_arguments(kind)["epochs"] > 1
    with pytest.raises(ConfigurationError, match="kind must be one of sasrec, bert4rec, got 'gru'"):
        default_fit_arguments("gru")


def test_validation_holds_few_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """The metric is the same in batches of any size, and a batch's scores stay below a limit."""
    torch.manual_seed(0)
    model = build_recommender("sasrec", num_items=40).eval()
    samples = [Row(tuple((user + step) % 40 for step in range(1 + user % 5)), user) for user in range(23)]
    expected = validation_ndcg(model, samples)
    monkeypatch.setattr(fitting, "MAX_SCORES", 5 * 40)
    rows: list[int] = []
    scores = model.scores
    monkeypatch.setattr(model, "scores", lambda *inputs: rows.append(len(inputs[0])) or scores(*inputs))
    assert validation_ndcg(model, samples) == pytest.approx(expected, abs=1e-9)
    assert max(rows) == 5 and sum(rows) == 23
