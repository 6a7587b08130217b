"""The one door to every source."""

import gzip
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from peft_bituning.data import SOURCE_FORMS, load_interactions
from peft_bituning.errors import DataError

INTER = "user_id:token\titem_id:token\ttimestamp:float\nu\t1\t1\n"


def install_recbole(folder: Path, with_data: bool) -> None:
    """Put a package on the path that may be looked into but not imported."""
    package = folder / "recbole"
    data = package / "dataset_example" / "ml-100k"
    data.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('must not be imported')\n")
    if with_data:
        (data / "ml-100k.item").write_bytes("item_id:token\tmovie_title:token_seq\n1\tCaf\u00e9\n".encode("latin-1"))
        (data / "ml-100k.inter").write_text(INTER)
    else:
        data.rmdir()


def test_ml_100k_is_read_out_of_recbole_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_recbole(tmp_path, with_data=True)
    monkeypatch.syspath_prepend(tmp_path)
    data = load_interactions("ml-100k")
    assert data.items.attributes == ({"title": "Café"},)
    assert data.source == "ml-100k"
    assert "recbole" not in sys.modules


def test_ml_100k_without_recbole_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_recbole(tmp_path, with_data=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DataError, match=r"pip install --no-deps recbole==1\.2\.1"):
        load_interactions("ml-100k")


@pytest.mark.skipif(importlib.util.find_spec("recbole") is None, reason="recbole is not installed")
def test_the_real_ml_100k() -> None:
    counts = load_interactions("ml-100k").counts()
    assert (counts["users"], counts["items"], counts["events"]) == (943, 1682, 100_000)
    assert counts["rejected"] == {}


def test_folder_and_atomic(write_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = write_folder([{"item_id": "1"}], "user_id,item_id,order\nu,1,1\n")
    assert load_interactions(f"folder:{folder}", progress=True).num_events == 1
    (tmp_path / "shop.inter").write_text(INTER)
    (tmp_path / "shop.item").write_text("item_id:token\n1\n")
    assert load_interactions(f"atomic:{tmp_path}").source == "shop"


def test_amazon_2018_by_files_or_folder(tmp_path: Path) -> None:
    reviews, meta = tmp_path / "reviews_Shop_5.json.gz", tmp_path / "meta_Shop.json.gz"
    reviews.write_bytes(gzip.compress(json.dumps({"reviewerID": "u", "asin": "1", "unixReviewTime": 1}).encode()))
    meta.write_bytes(gzip.compress(json.dumps({"asin": "1", "title": "t"}).encode()))
    for spec in (f"amazon2018:{reviews},{meta}", f"amazon2018:{tmp_path}"):
        assert load_interactions(spec).items.attributes == ({"title": "t"},)
    with pytest.raises(DataError, match="needs REVIEWS,META or a folder that holds both"):
        load_interactions(f"amazon2018:{reviews}")


def test_amazon_2023_out_of_a_folder(tmp_path: Path) -> None:
    for part in ("train", "valid", "test"):
        (tmp_path / f"Books.{part}.csv").write_text("user_id,parent_asin,rating,timestamp\nu,1,5.0,1\n")
    (tmp_path / "meta_Books.jsonl").write_text('{"parent_asin": "1", "title": "t"}\n')
    data = load_interactions("amazon2023:Books", root=tmp_path)
    assert data.report.counts == {"duplicate_event": 2}
    assert data.source == "Amazon-Reviews-2023 Books (2aa726ef)"


@pytest.mark.parametrize("spec", ["ml-1m", "folder:", "amazon2023", "", "atomics:x"])
def test_an_unknown_source_lists_the_forms(spec: str) -> None:
    with pytest.raises(DataError) as caught:
        load_interactions(spec)
    assert all(form in str(caught.value) for form in SOURCE_FORMS)
    assert f"Got {spec!r}" in str(caught.value)


def test_the_package_is_light_on_pandas() -> None:
    source = Path(importlib.util.find_spec("peft_bituning.data").origin).parent  # type: ignore[union-attr, arg-type]
    assert not any("import pandas" in file.read_text() for file in source.rglob("*.py"))
