"""Nested rows as pure tensors: who hosts whom, and what each token sees, against plain loops."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_bituning.tuners.rows.layout import RowLayout
from peft_bituning.tuners.rows.nested_rows import Nesting, find_hosts

texts_strategy = st.lists(st.lists(st.integers(0, 2), max_size=5), min_size=1, max_size=8)


def nest(texts: list[list[int]], num_prefix: int, has_suffix: bool = True) -> tuple[Nesting, RowLayout]:
    width = max(1, *map(len, texts))
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in texts])
    layout = RowLayout.from_mask(mask, num_prefix, has_suffix)
    return Nesting.of(layout, texts), layout


@given(texts=texts_strategy)
def test_hosts(texts: list[list[int]]) -> None:
    host = find_hosts(texts)
    for row, its_host in enumerate(host):
        assert texts[its_host][: len(texts[row])] == texts[row]
        assert host[its_host] == its_host
    # no host is the start of another: nothing is run twice
    hosts = set(host)
    for one in hosts:
        assert not any(other != one and texts[other][: len(texts[one])] == texts[one] for other in hosts)


@given(texts=texts_strategy, num_prefix=st.integers(0, 2), start=st.integers(0, 2))
def test_what_a_token_sees(texts: list[list[int]], num_prefix: int, start: int) -> None:
    nesting, layout = nest(texts, num_prefix)
    width = layout.attention_mask.shape[1]
    rows = torch.arange(len(texts) * width, dtype=torch.float32).reshape(len(texts), width, 1)
    found = nesting.inputs(rows, start)
    if nesting.num_slots == 0:
        assert set(found) == {"inputs_embeds"}
        return
    seen = (found["attention_mask"][:, 0] == 0).numpy()
    assert seen.shape == (nesting.num_hosts, width - start + nesting.num_slots, width + nesting.num_slots)
    for row, text in enumerate(texts):
        place, slot = int(nesting.place[row]), int(nesting.slot[row])
        if slot < 0:
            assert int(nesting.hosts[place]) == row
            continue
        query, end = width - start + slot, num_prefix + len(text)
        expected = np.zeros(width + nesting.num_slots, bool)
        expected[:end] = True
        expected[width + slot] = True
        np.testing.assert_array_equal(seen[place, query], expected)
        assert int(found["position_ids"][place, query]) == end
        assert float(found["inputs_embeds"][place, query]) == float(rows[row, end])
    for query in range(width - start):  # text is causal, and sees no slot
        np.testing.assert_array_equal(
            seen[:, query], np.tile(np.arange(seen.shape[2]) <= start + query, (len(seen), 1))
        )
    assert (found["position_ids"][:, : width - start] == torch.arange(start, width)).all()


@given(texts=texts_strategy, num_prefix=st.integers(0, 2), has_suffix=st.booleans())
def test_every_row_gets_its_states(texts: list[list[int]], num_prefix: int, has_suffix: bool) -> None:
    nesting, layout = nest(texts, num_prefix, has_suffix)
    width = layout.attention_mask.shape[1]
    states = torch.randn(nesting.num_hosts, width + nesting.num_slots, 2, requires_grad=True)
    rows = nesting.spread(states)
    assert rows.shape == (len(texts), width, 2)
    for row, text in enumerate(texts):
        place, slot, end = int(nesting.place[row]), int(nesting.slot[row]), num_prefix + len(text)
        assert torch.equal(rows[row, :end], states[place, :end])
        if has_suffix:
            assert torch.equal(rows[row, end], states[place, end if slot < 0 else width + slot])
    rows.sum().backward()
    assert states.grad is not None
