"""parameters.py counts by arithmetic that can be done by hand."""

from parameters import ROWS, count  # noqa: E402


def test_counts() -> None:
    by_name = {row.name.split(":")[0] + str(row.paper): row for row in ROWS}
    assert count(by_name["Bi-Tuning0.135"])[0] == (32 + 1) * 4096
    assert count(by_name["Bi-TuningNone"])[0] == (64 + 1) * 32 * 4096 + 4096 + 64  # and the null vector
    assert count(by_name["LlamaRec4.194"])[0] == 32 * 2 * 8 * (4096 + 4096)
    trained, total = count(by_name["LLM4REC787.3"])
    assert trained == total == 774_030_080
