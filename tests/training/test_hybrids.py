"""The hybrids of a run: what they read, what they rank, what the language model adds, and what is measured once."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from peft_bituning.catalog.text_encoder import TextEncoder
from peft_bituning.data import Interactions, ItemCatalog, LeaveOneOut
from peft_bituning.errors import CheckpointError, ConfigurationError
from peft_bituning.evaluation import RankingReport, evaluate_ranking, history_scorer, user_groups
from peft_bituning.metrics import user_gains
from peft_bituning.metrics.bootstrap import paired_bootstrap
from peft_bituning.recommenders import Hybrid, TextVectors, pad_histories
from peft_bituning.recommenders.hybrid import Sources
from peft_bituning.recommenders.hybrid.part import PARTS
from peft_bituning.serving import HybridRecommender, LaserRecommender
from peft_bituning.training import fit
from peft_bituning.training.hybrids import WITH, WITHOUT, RunHybrids, read_text, what_it_adds
from peft_bituning.training.report import Report
from peft_bituning.training.stages import TwoStageTraining

Train = Callable[..., LaserRecommender]
SHARE, SEED = 0.2, 5  # which draws items that are targets of the test


def results_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def row_of(results: dict[str, Any], name: str) -> dict[str, Any]:
    (row,) = (row for row in results["rows"] if row["name"] == name)
    return row["test"]


# ---------------------------------------------------------------------- what the language model adds


def report(ranks: Sequence[float], filtered: Sequence[float] | None = None) -> RankingReport:
    return RankingReport(np.array(ranks, float), np.array(ranks if filtered is None else filtered, float))


def hybrid_by(weights: dict[str, float]) -> Hybrid:
    """Return a hybrid with a part laser, whoever that may embed."""
    items = ItemCatalog(("a", "b", "c"), ({},) * 3)
    laser = SimpleNamespace(item_embeddings=torch.eye(3), user_embeddings=lambda histories: torch.ones(1, 3))
    sources = Sources(items, torch.ones(3), laser=laser)
    return Hybrid([PARTS["laser"].fit(sources), PARTS["seen"].fit(sources)], weights, sources)


FIRST, FIFTH, LAST = [1.0] * 40, [5.0] * 40, [20.0] * 40
GAIN = 1 - 1 / np.log2(6)  # from the fifth place to the first


def test_it_adds() -> None:
    found = what_it_adds(hybrid_by({"laser": 0.25}), report(FIRST, FIFTH), report(FIFTH, FIRST))
    assert found["weight"] == 0.25
    assert found["verdict"] == (
        f"the language model adds {GAIN:+.4f} NDCG@10 (95 % interval {GAIN:+.4f} to {GAIN:+.4f}, p 0.0002; 40 test "
        "users, seen items kept)"
    )
    assert found["unfiltered"]["ndcg@10"]["difference"] == pytest.approx(GAIN)
    assert found["filtered"]["ndcg@10"]["difference"] == pytest.approx(-GAIN)


def test_it_takes() -> None:
    found = what_it_adds(hybrid_by({"laser": 0.25}), report(FIFTH), report(FIRST))
    assert found["verdict"] == (
        f"the language model takes {-GAIN:+.4f} NDCG@10 (95 % interval {-GAIN:+.4f} to {-GAIN:+.4f}, p 0.0002; 40 "
        "test users, seen items kept)"
    )


def test_it_adds_nothing_that_is_sure() -> None:
    ranks, others = FIRST[:20] + LAST[:20], LAST[:19] + FIRST[:21]
    found = what_it_adds(hybrid_by({"laser": 0.25}), report(ranks), report(others))
    first = found["unfiltered"]["ndcg@10"]
    assert first["p"] > 0.5 and first["low"] < 0 < first["high"]
    assert found["verdict"] == (
        f"the language model adds nothing here that is sure: -0.0250 NDCG@10 (95 % interval {first['low']:+.4f} to "
        f"{first['high']:+.4f}, p {first['p']:.2g}; 40 test users, seen items kept)"
    )
    same = what_it_adds(hybrid_by({"laser": 0.25}), report(FIRST), report(FIRST))
    assert same["unfiltered"]["mrr"]["p"] == 1 and same["unfiltered"]["mrr"]["difference"] == 0
    assert "adds nothing here that is sure: +0.0000 NDCG@10 (95 % interval +0.0000 to +0.0000, p 1;" in same["verdict"]


@pytest.mark.parametrize("weights", [{"seen": 1.0}, {"seen": 1.0, "laser": 0.0}])
def test_without_a_weight_nothing_is_added_whatever_the_ranks_say(weights: dict[str, float]) -> None:
    found = what_it_adds(hybrid_by(weights), report(FIRST), report(LAST))
    assert found["weight"] == 0
    assert found["verdict"] == (
        "the language model adds nothing here: by the validation users its weight is not above 0"
    )
    assert found["unfiltered"]["ndcg@10"]["difference"] == 1


def test_all_differences_are_there_and_json() -> None:
    generator = np.random.default_rng(0)
    reports = [report(*generator.integers(1, 30, (2, 50))) for _ in range(2)]
    found = what_it_adds(hybrid_by({"laser": 1.0}), *reports)
    assert json.loads(json.dumps(found)) == found
    assert found.keys() == {"weight", "unfiltered", "filtered", "verdict"}
    for mode in ("unfiltered", "filtered"):
        gains, others = (user_gains(getattr(each, f"ranks_{mode}")) for each in reports)
        assert found[mode].keys() == {"recall@10", "ndcg@10", "mrr"}
        for name, difference in found[mode].items():
            assert difference == paired_bootstrap(gains[name], others[name]).to_dict()
            assert difference["difference"] == pytest.approx((gains[name] - others[name]).mean())


# ---------------------------------------------------------------------- texts


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """Let a made-up model read texts, and return what it has read."""
    read: list[tuple[str, list[str]]] = []

    def open_text_encoder(name: str, base: Any = None) -> TextEncoder:
        def encode(texts: Sequence[str], progress: bool) -> np.ndarray:
            read.append((name, list(texts)))
            return np.array([[len(text), text.count("t"), n] for n, text in enumerate(texts)], float)[:, ::-1]

        return TextEncoder(f"{name}:1", encode)

    monkeypatch.setattr("peft_bituning.training.hybrids.open_text_encoder", open_text_encoder)
    return read


def base_of(**fingerprint: int) -> Any:
    return SimpleNamespace(fingerprint=lambda: fingerprint)


def test_texts_are_encoded_once(encoded: list[Any], few: Interactions, tmp_path: Path) -> None:
    base, folder = base_of(layers=2), tmp_path / "a" / "b"
    first = read_text("model", few, base, folder)
    assert isinstance(first, TextVectors) and first.name == "model:1" and first.vectors.shape == (10, 3)
    assert first.vectors[:, 0].tolist() == list(range(10))
    (file,) = folder.iterdir()
    assert file.suffix == ".safetensors"
    again = read_text("model", few, base, folder, progress=True)
    assert len(encoded) == 1 and encoded[0] == ("model", [f"thing {n} of {n * n}" for n in range(10)])
    assert isinstance(again, TextVectors) and again.name == first.name
    assert again.vectors.dtype == np.float32 and np.array_equal(again.vectors, first.vectors)
    assert list(folder.iterdir()) == [file]


def test_other_texts_and_other_models_have_files_of_their_own(
    encoded: list[Any], few: Interactions, tmp_path: Path
) -> None:
    read_text("model", few, base_of(layers=2), tmp_path)
    titles = [{"title": row["title"] + "!"} for row in few.items.attributes]
    changed = replace(few, items=ItemCatalog(few.items.item_ids, tuple(titles)))
    turned = replace(few, items=ItemCatalog(few.items.item_ids, few.items.attributes[::-1]))
    for number, (name, data, base) in enumerate(
        [
            ("model", changed, base_of(layers=2)),
            ("model", turned, base_of(layers=2)),
            ("other", few, base_of(layers=2)),
            ("model", few, base_of(layers=3)),
        ],
        start=2,
    ):
        read_text(name, data, base, tmp_path)
        assert len(encoded) == len(list(tmp_path.iterdir())) == number
        read_text(name, data, base, tmp_path)
        assert len(encoded) == len(list(tmp_path.iterdir())) == number
    renamed = replace(few, items=ItemCatalog(tuple(f"x{n}" for n in range(10)), few.items.attributes))
    read_text("model", renamed, base_of(layers=2), tmp_path)  # an id is no text
    assert len(encoded) == 5


@pytest.mark.parametrize("name", [None, "tf-idf"])
def test_without_a_model_nothing_is_read(
    name: str | None, encoded: list[Any], few: Interactions, tmp_path: Path
) -> None:
    assert read_text(name, few, base_of(), tmp_path / "folder") == name
    assert encoded == [] and not (tmp_path / "folder").exists()


def test_a_model_that_fails_leaves_no_file(few: Interactions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> np.ndarray:
        raise KeyboardInterrupt

    monkeypatch.setattr("peft_bituning.training.hybrids.open_text_encoder", lambda name, base: TextEncoder(name, fail))
    with pytest.raises(KeyboardInterrupt):
        read_text("model", few, base_of(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_model_is_named(few: Interactions, tiny_base: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="text_model must name a layer from 0 to 2, got 'language-model:9'"):
        read_text("language-model:9", few, tiny_base(), tmp_path)


# ---------------------------------------------------------------------- ranks


def test_text_alone_ranks_by_the_likeness_to_the_history(tiny_data: Interactions) -> None:
    split = LeaveOneOut.of(tiny_data)
    hybrids = RunHybrids(tiny_data, split, split.samples("valid"), None, "tf-idf", 0)
    hybrid = hybrids.fit()
    found = hybrids.text_alone(hybrid)
    assert found is not None
    samples = split.samples("test")
    (part,) = (part for part in hybrid.fitted_parts if part.name == "text")
    alone = Hybrid([part], {"text": 2.0}, hybrid.sources)  # any weight gives the same order
    scores = alone.scores(*pad_histories([sample.history for sample in samples])).numpy()
    for rank, sample, row in zip(found.ranks_unfiltered, samples, scores, strict=True):
        above, equal = (row > row[sample.target]).sum(), (row == row[sample.target]).sum()
        assert rank == above + (equal + 1) / 2
    no_text = RunHybrids(tiny_data, split, split.samples("valid"), None, None, 0)
    assert no_text.text_alone(no_text.fit()) is None


def test_rows_are_those_of_the_saved_hybrids(trained: Any) -> None:
    results, samples = results_of(trained.folder), LeaveOneOut(trained.data.histories).samples("test")
    for name, hybrid in (
        (WITH, trained.recommender.hybrid),
        (WITHOUT, trained.recommender.without("laser").hybrid),
        (WITHOUT, HybridRecommender.from_pretrained(trained.folder).hybrid),
    ):
        found = evaluate_ranking(history_scorer(hybrid), samples).metrics()
        for mode in ("unfiltered", "filtered"):
            assert found[mode] == pytest.approx(row_of(results, name)[mode], abs=1e-9)
    assert results["hybrid"] == trained.recommender.hybrid.settings()
    assert results["language_model"]["weight"] == trained.recommender.hybrid.weights.get("laser", 0.0)
    assert results["seconds"].keys() >= {"baselines", "hybrid"}


# ---------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def held_out(
    tmp_path_factory: Any, tiny_base_folder: Path, tiny_data: Any, tiny_config: Any, tiny_arguments: Any
) -> Any:
    """Return a run with items that are held out, and its folder."""
    folder = tmp_path_factory.mktemp("held") / "output"
    arguments = tiny_arguments(folder, hold_out_items=SHARE, seed=SEED, stage2_epochs=0)
    return fit(tiny_data, base_model=tiny_base_folder, config=tiny_config, arguments=arguments), folder


def test_items_that_are_held_out_are_a_group_of_every_row(held_out: Any, tiny_data: Interactions) -> None:
    split = LeaveOneOut.of(tiny_data, SHARE, SEED)
    samples = split.samples("test")
    groups = user_groups(split, samples)
    assert len(split.held_out_items) == 2 and groups["items held out"].any()
    results = results_of(held_out[1])
    assert results["settings"]["hold_out_items"] == SHARE
    assert results["dataset"]["users_not_evaluated"] == split.users_not_evaluated
    assert len(results["rows"]) == 10
    for row in results["rows"]:
        found = row["test"]["groups"]
        assert row["test"]["users"] == len(samples)
        assert found.keys() == {name for name, users in groups.items() if users.any()}
        for name, measured in found.items():
            assert measured["users"] == groups[name].sum()
            for mode in ("unfiltered", "filtered"):
                assert all(np.isfinite(value) for value in measured[mode].values())
                assert measured[mode]["mrr"] >= 1 / len(tiny_data.items)
    assert "items held out" in (held_out[1] / "README.md").read_text()


def test_items_that_are_held_out_have_no_collaborative_state(
    held_out: Any, tiny_data: Interactions, tiny_base_folder: Path
) -> None:
    made, folder = held_out
    away = LeaveOneOut.of(tiny_data, SHARE, SEED).held_out_items
    everything = torch.arange(12)[:, None]
    for recommender in (made, LaserRecommender.from_pretrained(folder, base_model=tiny_base_folder, device="cpu")):
        known = recommender.id_recommender
        assert set(known.untrained_items) == away
        states, encoded = known.read(everything, torch.ones_like(everything))
        for item in range(12):
            assert bool(encoded[item, 0]) == (item not in away)
            assert bool(states[item].any()) == (item not in away)
        row = torch.arange(12)[None]
        assert known.encoded_mask(row, torch.ones_like(row))[0].tolist() == [item not in away for item in range(12)]
        assert torch.equal(recommender.hybrid.sources.counts == 0, torch.tensor([item in away for item in range(12)]))


def test_items_that_are_held_out_can_be_found(held_out: Any, tiny_data: Interactions) -> None:
    made, _ = held_out
    split = LeaveOneOut.of(tiny_data, SHARE, SEED)
    samples = [sample for sample in split.samples("test") if sample.target in split.held_out_items]
    for hybrid in (made.hybrid, made.without("laser").hybrid):
        found = evaluate_ranking(history_scorer(hybrid), samples)
        for ranks in (found.ranks_unfiltered, found.ranks_filtered):
            assert np.isfinite(ranks).all() and (ranks >= 1).all() and (ranks <= 12).all()
    ids = tiny_data.items.item_ids
    histories = [[ids[item] for item in sample.history] for sample in samples]
    for sample, row in zip(samples, made.recommend(histories, k=12, explain=True), strict=True):
        (shares,) = (shares for item, _, shares in row if item == ids[sample.target])
        for name in {"popularity", "item_knn", "sequence", "seen", "last"} & shares.keys():
            assert shares[name] == 0


def test_a_run_without_text_and_without_an_id_recommender(
    train: Train, few: Interactions, tiny_base_folder: Path, tmp_path: Path
) -> None:
    made = train(adapter={"prefix_encoder": "static"}, known=None, id_recommender="none", text_model=None)
    results = results_of(tmp_path / "output")
    assert [row["name"] for row in results["rows"]] == [
        "popularity",
        "item-kNN",
        WITHOUT,
        "untrained LLM (mean of text states)",
        "untrained suffix",
        "after stage 1",
        "after stage 2",
        WITH,
    ]
    assert {part.name for part in made.hybrid.fitted_parts} == {"popularity", "item_knn", "seen", "last", "laser"}
    hybrid = results["hybrid"]
    assert hybrid == json.loads(json.dumps(made.hybrid.settings()))
    assert (
        hybrid["text_model"] is None and hybrid["sequence"] is None and "laser" not in hybrid["weights_without_laser"]
    )
    said = results["language_model"]
    assert said.keys() == {"weight", "unfiltered", "filtered", "verdict"}
    assert said["verdict"].startswith("the language model ") and said["verdict"] in repr(made)
    assert said["verdict"] in (tmp_path / "output" / "README.md").read_text()
    assert results["settings"]["text_model"] is None and results["id_recommender"] is None
    asked = [few.items.item_ids[:3], []]
    loaded = LaserRecommender.from_pretrained(tmp_path / "output", base_model=tiny_base_folder, device="cpu")
    assert loaded.recommend(asked, explain=True) == made.recommend(asked, explain=True)
    lean = HybridRecommender.from_pretrained(tmp_path / "output")
    assert lean.recommend(asked) == made.without("laser").recommend(asked)


def test_text_by_the_language_model(train: Train, few: Interactions, tmp_path: Path) -> None:
    settings = {"known": None, "id_recommender": "none", "text_model": "language-model"}
    made = train(adapter={"prefix_encoder": "static"}, **settings)
    results = results_of(tmp_path / "output")
    assert "text (language-model:1)" in [row["name"] for row in results["rows"]]
    assert made.hybrid.text_model == results["hybrid"]["text_model"] == "language-model:1"
    (part,) = (part for part in made.hybrid.fitted_parts if part.name == "text")
    assert len(part.item_vectors) == len(few.items) and part.item_vectors.norm(dim=1).tolist() == pytest.approx(
        [1.0] * 10, abs=1e-5
    )


# ---------------------------------------------------------------------- what is measured once


@pytest.fixture
def begin(train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[int, list[Any]]]:
    """Return a runner that stops before training: how often baselines were measured, and the rows that it has."""
    measured: list[int] = []
    count = Report._count

    class Stopped(Exception):
        pass

    def stop(*_: Any) -> None:
        raise Stopped

    monkeypatch.setattr(TwoStageTraining, "run", stop)
    monkeypatch.setattr(Report, "_count", lambda report: measured.append(1) or count(report))

    def run(**changes: Any) -> tuple[int, list[Any]]:
        measured.clear()
        with pytest.raises(Stopped):
            train(adapter={"prefix_encoder": "static"}, known=None, id_recommender="none", **changes)
        saved = json.loads((tmp_path / "output" / "checkpoints" / "baselines.json").read_text())
        return len(measured), saved["rows"]

    return run


def test_baselines_are_not_measured_again(begin: Any) -> None:
    settings = {"hold_out_items": 0.3, "text_model": None}
    assert begin(**settings)[0] == 1
    times, rows = begin(**settings, resume=True)
    assert times == 0 and [row["name"] for row in rows[:3]] == ["popularity", "item-kNN", WITHOUT]
    assert begin(**settings, resume=False)[0] == 1


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"text_model": "tf-idf"}, {"text_model": None}),
        ({"text_model": None}, {"text_model": "tf-idf"}),
        ({"hold_out_items": 0.0}, {"hold_out_items": 0.3}),
        ({"hold_out_items": 0.3}, {"hold_out_items": 0.4}),
        ({"hold_out_items": 0.3, "seed": 0}, {"hold_out_items": 0.3, "seed": 1}),
        ({"max_validation_users": None}, {"max_validation_users": 3}),
    ],
)
def test_baselines_of_other_settings_are_measured_anew(
    before: dict[str, Any], after: dict[str, Any], begin: Any
) -> None:
    """Another seed holds other items out; the weights of the hybrid are fitted on the validation users there are."""
    begin(**before)
    times, rows = begin(**after, resume=True)
    assert times == 1
    assert rows == begin(**after)[1]


def test_a_trained_run_goes_on_with_the_same_text_only(train: Train, monkeypatch: Any, tmp_path: Path) -> None:
    settings = {"adapter": {"prefix_encoder": "static"}, "known": None, "id_recommender": "none"}
    stages = Report.stages

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Report, "stages", stop)
    with pytest.raises(KeyboardInterrupt):
        train(**settings)
    monkeypatch.setattr(Report, "stages", stages)
    for change in ({"text_model": None}, {"hold_out_items": 0.3}):
        with pytest.raises(CheckpointError, match=next(iter(change))):
            train(**settings, **change, resume=True)
    train(**settings, resume=True)
    assert [row["name"] for row in results_of(tmp_path / "output")["rows"]][-1] == WITH
