"""Recommending, embedding, adding items: what a user of a loaded recommender does."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from peft_bituning import LaserRecommender
from peft_bituning.catalog import ExactIndex, FaissIndex, ItemTable
from peft_bituning.data import ItemCatalog, PromptTemplate
from peft_bituning.errors import ConfigurationError, DataError, InputError, UnknownItemError

NEW = {"item_id": "new1", "title": "Gold ladder", "brand": "Acme", "category": "tools"}
HISTORY = ["007", "8", "b2"]


def ids(row: list[tuple[str, float]]) -> list[str]:
    return [item for item, _ in row]


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


# ---------------------------------------------------------------------- recommend


def test_lists_are_the_catalog_by_cosine(trained) -> None:
    recommender = trained.recommender
    (row,) = recommender.recommend([HISTORY], k=12, filter_seen=False, parts="laser")
    cosines = unit(recommender.encode_users([HISTORY])) @ unit(recommender.encode_items()).T
    expected = {item: float(score) for item, score in zip(recommender.items.item_ids, cosines[0], strict=True)}
    assert dict(row) == pytest.approx(expected, abs=1e-5)
    assert [score for _, score in row] == sorted(dict(row).values(), reverse=True)


def test_seen_items_are_left_out_unless_wanted(trained) -> None:
    (kept,) = trained.recommender.recommend([HISTORY], k=12, filter_seen=False)
    (left,) = trained.recommender.recommend([HISTORY], k=12)
    assert left == [pair for pair in kept if pair[0] not in HISTORY]
    assert len(left) == 9


def test_fewer_than_k_left_gives_fewer(trained) -> None:
    everything = list(trained.recommender.items.item_ids)
    lists = trained.recommender.recommend([everything, everything[:-1], HISTORY], k=100)
    assert [len(row) for row in lists] == [0, 1, 9]
    assert ids(lists[1]) == [everything[-1]]


def test_candidates_limit_the_choice(trained) -> None:
    (whole,) = trained.recommender.recommend([HISTORY], k=12)
    (row,) = trained.recommender.recommend([HISTORY], k=12, candidates=["c1", "b5", "8", "c1"])
    assert row == [pair for pair in whole if pair[0] in ("c1", "b5")]
    assert trained.recommender.recommend([HISTORY], candidates=[]) == [[]]


def test_an_empty_history_is_a_cold_start(trained) -> None:
    cold, warm = trained.recommender.recommend([[], HISTORY], k=12, filter_seen=False)
    assert len(cold) == 12
    assert cold != warm
    (alone,) = trained.recommender.recommend([[]], k=12)
    assert dict(alone) == pytest.approx(dict(cold), abs=1e-5)


def test_no_users_give_no_lists(trained) -> None:
    assert trained.recommender.recommend([]) == []
    assert trained.recommender.similar_items([]) == []
    assert trained.recommender.encode_users([]).shape == (0, 32)
    assert trained.recommender.encode_items([]).shape == (0, 32)


def test_unknown_ids_are_named(trained) -> None:
    recommender = trained.recommender
    with pytest.raises(UnknownItemError, match="2 item ids are not in the catalog: nope1, nope2; add them with add_it"):
        recommender.recommend([["007", "nope1"], ["nope2"]])
    with pytest.raises(UnknownItemError, match="nope"):
        recommender.encode_users([["nope"]])
    for call in (recommender.similar_items, recommender.encode_items):
        with pytest.raises(UnknownItemError, match="'nope'"):
            call(["007", "nope"])
    with pytest.raises(UnknownItemError, match="'nope'"):
        recommender.recommend([HISTORY], candidates=["nope"])


def test_unknown_ids_can_be_ignored(trained) -> None:
    with_unknown, all_unknown = trained.recommender.recommend(
        [["nope", *HISTORY], ["nope"]], k=5, on_unknown="ignore", batch_size=1
    )
    known, empty = trained.recommender.recommend([HISTORY, []], k=5, batch_size=1)
    assert with_unknown == known
    assert all_unknown == empty


def test_ids_are_strings_and_stay_so(trained, loaded) -> None:
    assert loaded.items.item_ids[0] == "007"
    assert loaded.recommend([["007"]], k=3) == trained.recommender.recommend([["007"]], k=3)
    with pytest.raises(UnknownItemError, match="not in the catalog: 7;"):
        loaded.recommend([["7"]])
    assert loaded.recommend([[8]], k=3) == loaded.recommend([["8"]], k=3)


def test_numbers_may_come_from_numpy(trained) -> None:
    recommender = trained.recommender
    found = recommender.recommend([HISTORY], k=np.int64(3), batch_size=np.int32(2))
    assert found == recommender.recommend([HISTORY], k=3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r: r.recommend("007"), r"histories must be a list of lists of item ids, got '007'"),
        (lambda r: r.recommend(["007", "8"]), r"got \['007', '8'\]; for one user write \[\[\.\.\.\]\]"),
        (lambda r: r.encode_users(["007"] * 99), r"lists of item ids, got .{80}; for one user"),
        (lambda r: r.similar_items("007"), r"item_ids must be a list of item ids, got '007'; .* \['007'\]"),
        (lambda r: r.encode_items("007"), r"item_ids must be a list of item ids, got '007'"),
        (lambda r: r.recommend([HISTORY], candidates="007"), r"candidates must be a list of item ids, got '007'"),
        (lambda r: r.recommend([HISTORY], k=0), "k must be an integer >= 1, got 0"),
        (lambda r: r.recommend([HISTORY], k=True), "k must be an integer >= 1, got True"),
        (lambda r: r.similar_items(["007"], k=0), "k must be at least 1, got 0"),
        (lambda r: r.recommend([HISTORY], on_unknown="skip"), "on_unknown must be 'error' or 'ignore', got 'skip'"),
        (lambda r: r.encode_users([HISTORY], batch_size=0), "batch_size must be an integer >= 1, got 0"),
        (lambda r: r.encode_users([HISTORY], batch_size=1.5), "batch_size must be an integer >= 1, got 1.5"),
    ],
)
def test_wrong_arguments_are_named(trained, call, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        call(trained.recommender)


def test_similar_items_are_the_tables_neighbours(trained) -> None:
    recommender = trained.recommender
    table = recommender.table.embeddings.numpy()
    rows = recommender.similar_items(["b3", "007"], k=20)
    for index, row in zip((3, 0), rows, strict=True):
        order = [int(place) for place in np.argsort(-(table @ table[index]), kind="stable") if place != index]
        assert ids(row) == [recommender.items.item_ids[place] for place in order]


# ---------------------------------------------------------------------- embeddings


def test_embeddings_do_not_depend_on_the_batch(trained) -> None:
    histories = [HISTORY, [], ["b9"], [*HISTORY, "c0", "c1", "b4"], ["b5", "b6"]]
    whole = trained.recommender.encode_users(histories)
    assert whole.shape == (5, 32) and whole.dtype == np.float32
    for batch_size in (1, 2):
        assert trained.recommender.encode_users(histories, batch_size=batch_size) == pytest.approx(whole, abs=1e-5)


def test_embeddings_can_be_normalized(trained) -> None:
    recommender = trained.recommender
    for encode, given in ((recommender.encode_users, [HISTORY, []]), (recommender.encode_items, ["007", "8"])):
        plain, normalized = encode(given), encode(given, normalize_embeddings=True)
        assert np.linalg.norm(normalized, axis=1) == pytest.approx(np.ones(2), abs=1e-6)
        assert normalized == pytest.approx(unit(plain), abs=1e-6)
        assert not np.allclose(np.linalg.norm(plain, axis=1), 1)


def test_progress_is_shown_when_asked_for(trained, capsys) -> None:
    trained.recommender.encode_users([HISTORY])
    trained.recommender.encode_items(["007"])
    assert capsys.readouterr().err == ""
    trained.recommender.encode_users([HISTORY], show_progress_bar=True)
    trained.recommender.encode_items(["007"], show_progress_bar=True)
    shown = capsys.readouterr().err
    assert "encoding users" in shown and "encoding items" in shown


def test_items_speak_the_language_of_the_table(trained) -> None:
    recommender = trained.recommender
    table = recommender.table.embeddings.numpy()
    assert recommender.encode_items(normalize_embeddings=True) == pytest.approx(table, abs=1e-5)
    assert recommender.encode_items(["b3"]) == pytest.approx(recommender.encode_items()[3:4], abs=1e-5)
    # The users' weights went on training: they would not do for items.
    as_users = recommender.encode_users([[item] for item in recommender.items.item_ids], normalize_embeddings=True)
    assert np.abs(as_users - table).max() > 1e-3


def test_encoding_items_leaves_the_users_weights_active(trained) -> None:
    before = trained.recommender.encode_users([HISTORY])
    trained.recommender.encode_items()
    assert trained.recommender.model.active_adapter == "default"
    assert np.array_equal(trained.recommender.encode_users([HISTORY]), before)


def test_nothing_is_trainable_and_nothing_drops_out(loaded) -> None:
    loaded.encode_items(["007"])
    assert not [name for name, value in loaded.model.named_parameters() if value.requires_grad]
    assert not loaded.model.training


# ---------------------------------------------------------------------- new items


def test_a_new_item_is_recommendable_without_training(loaded) -> None:
    table = loaded.table.embeddings.clone()
    weights = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    users = loaded.encode_users([HISTORY])
    loaded.add_items([NEW])
    assert loaded.items.item_ids[-1] == "new1" and len(loaded.table) == 13
    assert "new1" in ids(loaded.recommend([HISTORY], k=13)[0])
    new = loaded.encode_items(["new1"], normalize_embeddings=True)
    assert loaded.table.embeddings[-1:].numpy() == pytest.approx(new, abs=1e-6)
    assert np.array_equal(loaded.table.embeddings[:-1].numpy(), table.numpy())
    assert np.array_equal(loaded.encode_users([HISTORY]), users)
    assert all(value.equal(loaded.model.state_dict()[name]) for name, value in weights.items())


def test_a_history_may_hold_new_items(loaded) -> None:
    loaded.add_items([NEW])
    (row,) = loaded.recommend([["new1"]], k=13)
    assert len(row) == 12 and "new1" not in ids(row)
    embeddings = loaded.encode_users([["new1"], [*HISTORY, "new1"], HISTORY, []])
    assert np.isfinite(embeddings).all()
    assert len(np.unique(embeddings.round(4), axis=0)) == 4


def test_new_items_survive_saving(loaded, trained, tmp_path) -> None:
    loaded.add_items([NEW, {"item_id": "0012", "title": "Tin &amp; lid"}])
    loaded.save_pretrained(tmp_path)
    again = LaserRecommender.from_pretrained(tmp_path, base_model=trained.base_folder, device="cpu")
    assert again.items.item_ids[-2:] == ("new1", "0012")
    assert again.items.attributes[-1]["title"] == "Tin & lid"
    asked = [["new1", "0012"], HISTORY]
    assert again.recommend(asked, k=14) == loaded.recommend(asked, k=14)


def test_new_columns_do_not_change_the_text_of_present_items(trained) -> None:
    """A catalog of titles and years gets an item with a brand, which the default template would now prefer."""
    present = trained.recommender
    records = [
        {"item_id": item, "title": row["title"], "year": str(1990 + place)}
        for place, (item, row) in enumerate(zip(present.items.item_ids, present.items.attributes, strict=True))
    ]
    recommender = LaserRecommender(
        present.base,
        present.model,
        ItemCatalog.from_records(records),
        present.table,
        replace(PromptTemplate.from_preset("paper"), fields=None),
        present.id_recommender,
        present.settings,
        "cpu",
    )
    before = recommender.encode_items(["8"])
    recommender.add_items([NEW])
    assert np.array_equal(recommender.encode_items(["8"]), before)
    assert recommender.template.fields == ("year",)


@pytest.mark.parametrize(
    ("records", "error", "message"),
    [
        ([NEW, {"item_id": "007", "title": "Again"}], DataError, "Already in the catalog: '007'"),
        ([NEW, NEW], DataError, "given more than once: 'new1'"),
        ([NEW, {"title": "No id"}], DataError, "Item 2 has no usable 'item_id'"),
        (NEW, ConfigurationError, "items must be a list of records, got .*; for one item write"),
    ],
)
def test_a_refused_item_leaves_everything_usable(loaded, records, error, message: str) -> None:
    before = loaded.recommend([HISTORY], k=12)
    with pytest.raises(error, match=message):
        loaded.add_items(records)
    assert len(loaded.items) == len(loaded.table) == 12
    assert loaded.recommend([HISTORY], k=12) == before
    loaded.add_items([NEW])
    assert len(loaded.items) == 13


def test_a_failure_while_encoding_leaves_everything_usable(loaded) -> None:
    before = loaded.recommend([HISTORY], k=12)
    weight = loaded.model.get_input_embeddings().weight
    kept = weight.detach().clone()
    weight.data.fill_(float("nan"))
    with pytest.raises(InputError, match="embeddings must be finite"):
        loaded.add_items([NEW])
    weight.data.copy_(kept)
    assert len(loaded.items) == len(loaded.table) == 12
    assert loaded.model.active_adapter == "default"
    assert loaded.recommend([HISTORY], k=12) == before


def test_adding_nothing_changes_nothing(loaded) -> None:
    loaded.add_items([])
    assert len(loaded.items) == len(loaded.table) == 12


# ---------------------------------------------------------------------- another index


def test_a_graph_gives_the_exact_lists(loaded) -> None:
    pytest.importorskip("faiss")
    loaded.add_items([{"item_id": f"n{n}", "title": f"Thing {n * n} of {n}"} for n in range(60)])
    asked = [HISTORY, [], ["n7", "n8"]]
    exact, neighbours = loaded.recommend(asked), loaded.similar_items(["n3", "007"])
    loaded.use_index(FaissIndex)
    assert isinstance(loaded.index, FaissIndex)
    for found, true in zip(
        [*loaded.recommend(asked), *loaded.similar_items(["n3", "007"])], [*exact, *neighbours], strict=True
    ):
        assert ids(found) == ids(true) and len(found) == 10
        assert dict(found) == pytest.approx(dict(true), abs=1e-6)


def test_another_index_survives_new_items(loaded) -> None:
    pytest.importorskip("faiss")
    loaded.use_index(lambda embeddings: FaissIndex(embeddings, M=8))
    loaded.add_items([NEW])
    assert len(loaded.index) == 13 and loaded.index.parameters["M"] == 8
    assert "new1" in ids(loaded.recommend([HISTORY], k=13)[0])


def test_an_index_that_cannot_be_made_changes_nothing(loaded) -> None:
    before = loaded.recommend([HISTORY])
    with pytest.raises(ConfigurationError, match="chunk_size must be at least 1, got 0"):
        loaded.use_index(lambda embeddings: ExactIndex(embeddings, chunk_size=0))
    loaded.add_items([])
    assert loaded.recommend([HISTORY]) == before


def test_the_example_in_the_docs_runs(trained, tmp_path, monkeypatch, capsys) -> None:
    pytest.importorskip("faiss")
    text = (Path(__file__).parents[2] / "docs" / "integrations.md").read_text(encoding="utf-8")
    section = text.split("\n## faiss\n")[1].split("\n## ")[0]
    code = [line[4:] for line in section.splitlines() if line.startswith("    ") or not line]
    (tmp_path / "output").symlink_to(trained.folder)
    (tmp_path / "tiny-llama").symlink_to(trained.base_folder)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec("\n".join(code), names)
    assert capsys.readouterr().out == "1.0\n"  # so small a catalog is searched exactly
    assert isinstance(names["recommender"].index, ExactIndex)  # type: ignore[attr-defined]


# ---------------------------------------------------------------------- construction


def test_a_table_of_another_size_is_refused(trained) -> None:
    present = trained.recommender
    table = ItemTable(present.table.embeddings[:-1])
    with pytest.raises(ConfigurationError, match="the item table must have 12 rows, one per item, got 11"):
        LaserRecommender(
            present.base,
            present.model,
            present.items,
            table,
            present.template,
            present.id_recommender,
            present.settings,
            "cpu",
        )


def test_two_recommenders_cannot_share_one_language_model(trained, tiny_base) -> None:
    base = tiny_base()
    first = LaserRecommender.from_pretrained(trained.folder, base_model=base, device="cpu")
    with pytest.raises(ConfigurationError, match="base_model must be without an adapter, got 'tiny-llama'"):
        LaserRecommender.from_pretrained(trained.folder, base_model=base)
    assert first.recommend([HISTORY], k=3) == trained.recommender.recommend([HISTORY], k=3)
