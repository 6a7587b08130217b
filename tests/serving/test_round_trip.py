"""Train, save, and load in a new process: the same bits, the same lists, the evaluator's ranks."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from peft_bituning import LaserRecommender
from peft_bituning.data import LeaveOneOut
from peft_bituning.evaluation import RankingReport, rank_users
from peft_bituning.recommenders import Precomputed
from peft_bituning.training import fit

pytestmark = pytest.mark.timeout(900)  # processes of their own

RELOAD = """
import json, sys
import numpy as np, torch
from peft_bituning import LaserRecommender
torch.set_num_threads(1)
folder, base, histories, target = sys.argv[1:]
recommender = LaserRecommender.from_pretrained(folder, base_model=base, device="cpu")
histories = json.loads(histories)
np.savez(target, users=recommender.encode_users(histories), items=recommender.encode_items(),
         table=recommender.table.embeddings.numpy())
everything = recommender.recommend(histories, k=len(recommender.items), filter_seen=False)
print(json.dumps({"all": everything, "unseen": recommender.recommend(histories, k=3)}))
"""


@pytest.fixture(scope="module")
def samples(trained):
    return LeaveOneOut(trained.data.histories).samples("test")


@pytest.fixture(scope="module")
def histories(trained, samples) -> list[list[str]]:
    return [[trained.data.items.item_ids[item] for item in sample.history] for sample in samples]


def test_a_new_process_gives_the_same_bits(trained, histories, run_python, tmp_path) -> None:
    asked = [*histories, []]
    target = tmp_path / "found.npz"
    out = run_python(RELOAD, trained.folder, trained.base_folder, json.dumps(asked), target, cwd=tmp_path)
    found, lists = np.load(target), json.loads(out.splitlines()[-1])
    here = trained.recommender
    assert np.array_equal(found["users"], here.encode_users(asked))
    assert np.array_equal(found["items"], here.encode_items())
    assert np.array_equal(found["table"], here.table.embeddings.numpy())
    for key, settings in (("all", {"k": 12, "filter_seen": False}), ("unseen", {"k": 3})):
        expected = here.recommend(asked, **settings)
        assert [[tuple(pair) for pair in row] for row in lists[key]] == expected


@pytest.mark.parametrize("filter_seen", [False, True])
def test_positions_are_the_evaluators_ranks(trained, samples, histories, loaded, filter_seen) -> None:
    report = rank_users(trained.recommender.encoder, samples, trained.recommender.table)
    ranks = report.ranks_filtered if filter_seen else report.ranks_unfiltered
    lists = loaded.recommend(histories, k=12, filter_seen=filter_seen, parts="laser")
    compared = 0
    for sample, rank, row in zip(samples, ranks, lists, strict=True):
        target = trained.data.items.item_ids[sample.target]
        order, scores = [item for item, _ in row], np.array([score for _, score in row])
        if target not in order:  # left out as seen, which the evaluator counts as last place
            assert filter_seen and sample.target in sample.history
            continue
        place = order.index(target)
        if (np.abs(np.delete(scores, place) - scores[place]) > 1e-6).all():
            assert place + 1 == rank
            compared += 1
    assert compared >= 25


@pytest.mark.parametrize(("parts", "name"), [("laser", "after stage 2"), ("hybrid", "hybrid with Laser")])
def test_the_saved_results_are_those_of_the_saved_recommender(trained, samples, histories, loaded, parts, name) -> None:
    ids = trained.data.items.item_ids
    lists = loaded.recommend(histories, k=12, filter_seen=False, parts=parts)
    places = [
        [item for item, _ in row].index(ids[sample.target]) + 1.0 for sample, row in zip(samples, lists, strict=True)
    ]
    ranks = np.array(places)
    rows = json.loads((trained.folder / "results.json").read_text())["rows"]
    (expected,) = (row for row in rows if row["name"] == name)
    found = RankingReport(ranks, ranks).metrics()["unfiltered"]
    assert found == pytest.approx(expected["test"]["unfiltered"], abs=1e-9)


def test_saving_again_gives_the_same_files(trained, loaded, tmp_path) -> None:
    loaded.save_pretrained(tmp_path)
    first, second = (
        json.loads((folder / "manifest.json").read_text())["sha256"] for folder in (trained.folder, tmp_path)
    )
    assert first == second


def test_the_folder_is_all_safetensors_and_text(trained) -> None:
    files = {path.suffix for path in trained.folder.rglob("*") if path.is_file()}
    assert files == {".safetensors", ".json", ".jsonl", ".md", ".png"}


@pytest.mark.parametrize("kind", ["none", "precomputed"])
def test_other_recommenders_or_none_make_the_trip_too(kind, trained, tiny_arguments, tiny_config, tmp_path) -> None:
    given = None
    if kind == "precomputed":
        given = Precomputed(torch.randn(12, 8, generator=torch.Generator().manual_seed(0)))
    config = replace(tiny_config, prefix_encoder="linear" if given else "static")
    arguments = tiny_arguments(tmp_path / "output", id_recommender="none", stage2_epochs=0)
    here = fit(trained.data, base_model=trained.base_folder, config=config, arguments=arguments, id_recommender=given)
    again = LaserRecommender.from_pretrained(tmp_path / "output", base_model=trained.base_folder, device="cpu")
    assert (tmp_path / "output" / "recommender").exists() == (given is not None)
    asked = [["007", "8"], []]
    assert np.array_equal(again.encode_users(asked), here.encode_users(asked))
    assert again.recommend(asked) == here.recommend(asked)
