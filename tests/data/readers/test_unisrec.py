"""UniSRec's processed downloads: every event again, out of cuts of the histories."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_bituning.data import Interactions, ReadReport
from peft_bituning.data.readers.atomic import chained_events, read_atomic, split_texts
from peft_bituning.data.rejects import Row
from peft_bituning.errors import DataError

HEADER = "user_id:token\titem_id_list:token_seq\titem_id:token\n"
LIMIT = 50
HISTORIES = {
    "A1": [1, 2, 3],
    "A2": [3, 1, 3, 3, 2],
    "007": [*range(40), *range(20, 40), *range(30, 0, -1)],
    "one": [5] * 70,
}


def cuts(history: Sequence[object], limit: int = LIMIT) -> list[list[tuple[list[str], str]]]:
    """Return training, validation and test rows as upstream writes them: training rows with the longest cut first."""
    names = list(map(str, history))
    training = [(names[:cut][-limit:], names[cut]) for cut in range(len(names) - 3, 0, -1)]
    return [training, [(names[:-2][-limit:], names[-2])], [(names[:-1][-limit:], names[-1])]]


def write_download(folder: Path, histories: dict[str, list[int]], texts: str, index: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for place, part in enumerate(("train", "valid", "test")):
        rows = [
            f"{user}\t{' '.join(before)}\t{target}\n"
            for user, history in enumerate(histories.values())
            for before, target in cuts(history)[place]
        ]
        (folder / f"Shop.{part}.inter").write_text(HEADER + "".join(rows))
    (folder / "Shop.text").write_text("item_id:token\ttext:token_seq\n" + texts)
    if index:
        (folder / "Shop.user2index").write_text("".join(f"{user}\t{n}\n" for n, user in enumerate(histories)))
        (folder / "Shop.item2index").write_text("".join(f"I{item}\t{item}\n" for item in range(60)))
    return folder


def read(path: Path) -> tuple[Interactions, ReadReport]:
    report = ReadReport()
    return read_atomic(path, report), report


def own_ids(data: Interactions) -> dict[str, list[str]]:
    return {
        user: [data.items.item_ids[item] for item in history]
        for user, history in zip(data.user_ids, data.histories, strict=True)
    }


def test_the_events_come_back_exactly_with_their_own_ids(tmp_path: Path) -> None:
    texts = "".join(f"I{item}\tThing {item}. Office Products Paper. Brand {item}. \n" for item in reversed(range(60)))
    data, report = read(write_download(tmp_path, HISTORIES, texts))
    assert own_ids(data) == {user: [f"I{item}" for item in history] for user, history in HISTORIES.items()}
    assert max(map(len, data.histories)) > LIMIT
    assert data.items.item_ids == tuple(f"I{item}" for item in range(60))
    assert data.items.attributes[7] == {"title": "Thing 7", "category": "Paper", "brand": "Brand 7"}
    assert not report.rejected


def test_without_index_files_ids_are_those_of_the_rows(tmp_path: Path) -> None:
    texts = "".join(f"{item}\ta thing\n" for item in range(60))
    data = read(write_download(tmp_path, HISTORIES, texts, index=False))[0]
    assert data.user_ids == ("0", "1", "2", "3")
    assert data.histories[1] == (3, 1, 3, 3, 2)


def rows(file: str, before_and_target: Iterable[tuple[Sequence[str], str]]) -> list[Row]:
    """Return one user's rows of (items before, next item)."""
    return [
        Row(file, line, {"user_id": "u", "item_id_list": " ".join(before), "item_id": target})
        for line, (before, target) in enumerate(before_and_target)
    ]


@given(st.lists(st.integers(0, 3), min_size=3, max_size=14), st.integers(2, 6), st.booleans())
def test_any_history_survives_any_limit_in_both_directions(history: list[int], limit: int, ascending: bool) -> None:
    training, valid, test = cuts(history, limit)
    training = training[::-1] if ascending else training
    events = chained_events(rows("train", training), rows("held out", valid + test), ReadReport(), {}, {})
    assert [event.item_id for event in events] == list(map(str, history))


def test_a_lost_row_is_bridged_and_one_that_does_not_follow_is_rejected() -> None:
    report = ReadReport()
    training = rows("train", [("abc", "d"), ("a", "b"), ("xyzq", "e")])
    events = chained_events(training, rows("test", [("abcde", "f"), ("kl", "m")]), report, {}, {})
    assert "".join(event.item_id for event in events) == "abcdef"
    assert [(row.kind, row.file, row.line) for row in report.rejected] == [
        ("inconsistent_history", "train", 2),
        ("inconsistent_history", "test", 1),
    ]


def test_texts_are_split_by_the_domain_s_name() -> None:
    root = "Industrial & Scientific"
    texts = [
        f"Seal. Type B. {root} Seals O-Rings. S.O.L. Inc. ",
        f"{root} />. {root} Lab. Dykem. ",
        f"Glove. {root}. . ",
        f"Lamp. {root}. ",
        f"{root} Tools. Bolt. ",
        "Rope. . Acme. ",
        "Odd one",
    ]
    assert [{key: value for key, value in record.items() if value} for record in split_texts(texts)] == [
        {"title": "Seal. Type B", "category": "Seals O-Rings", "brand": "S.O.L. Inc"},
        {"title": f"{root} />", "category": "Lab", "brand": "Dykem"},
        {"title": "Glove"},
        {"title": "Lamp"},
        {"category": "Tools", "brand": "Bolt"},
        {"title": "Rope", "brand": "Acme"},
        {"title": "Odd one"},
    ]


def test_other_texts_are_titles() -> None:
    assert split_texts(["white metal lantern.", "a. b. c."]) == [{"title": "white metal lantern"}, {"title": "a. b. c"}]
    assert split_texts([]) == []


def test_item_files_stand_in_for_texts_and_wrong_headers_are_errors(tmp_path: Path) -> None:
    write_download(tmp_path, {"u": [0, 1, 2]}, "")
    (tmp_path / "Shop.text").write_text("asin:token\ttitle:token\n")
    with pytest.raises(DataError, match="Shop.text must have the columns item_id, text; found asin, title"):
        read(tmp_path)
    (tmp_path / "Shop.text").unlink()
    (tmp_path / "Shop.item").write_text("item_id:token\ttitle:token\nI0\ta\nI1\tb\nI2\tc\n")
    assert read(tmp_path)[0].histories == ((0, 1, 2),)


def test_bad_lines_of_an_index_are_rejected(tmp_path: Path) -> None:
    folder = write_download(tmp_path, {"u": [0, 1, 2]}, "".join(f"I{item}\ta thing\n" for item in range(60)))
    with (folder / "Shop.item2index").open("a") as stream:
        stream.write("I60\n")
    assert read(folder)[1].counts == {"wrong_column_count": 1}
