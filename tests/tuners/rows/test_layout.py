"""Rows in, rows out: every token stands where the layout says, whatever the padding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peft_bituning.tuners.rows.layout import RowLayout


@st.composite
def masks(draw: st.DrawFn) -> Tensor:
    """Draw masks [B, T]: left-padded, right-padded, holed, full and empty rows mixed."""
    width = draw(st.integers(1, 7))
    rows = draw(st.lists(st.integers(0, 2**width - 1), min_size=1, max_size=4))
    shapes = draw(st.lists(st.sampled_from(["left", "right", "any"]), min_size=len(rows), max_size=len(rows)))
    mask = torch.tensor([[row >> column & 1 for column in range(width)] for row in rows])
    for row, shape in enumerate(shapes):
        if shape != "any":
            mask[row] = mask[row].sort(descending=shape == "right").values
    return mask.bool() if draw(st.booleans()) else mask


def tokens(mask: Tensor, width: int = 3) -> Tensor:
    """Return [B, T, D] in which every token tells its row and column; padding is NaN."""
    rows, columns = mask.shape
    values = torch.arange(1.0, rows * columns * width + 1).view(rows, columns, width)
    return values.masked_fill(~mask.bool().unsqueeze(-1), float("nan"))


@settings(max_examples=150, deadline=None)
@given(mask=masks(), num_prefix=st.integers(0, 3), has_suffix=st.booleans())
def test_each_token_stands_where_the_layout_says(mask: Tensor, num_prefix: int, has_suffix: bool) -> None:
    layout = RowLayout.from_mask(mask, num_prefix, has_suffix)
    text = tokens(mask)
    prefix = torch.full((len(mask), num_prefix, 3), -1.0) if num_prefix else None
    suffix = torch.full((1, 1, 3), -2.0) if has_suffix else None
    packed = layout.pack(prefix, text, suffix)
    assert packed.shape == (len(mask), num_prefix + mask.shape[1] + has_suffix, 3)
    for row, real in enumerate(mask.bool()):
        expected = [torch.full((3,), -1.0)] * num_prefix + list(text[row, real])
        if has_suffix:
            expected.append(torch.full((3,), -2.0))  # right after the last real token
        filled = len(expected)
        assert layout.attention_mask[row].tolist() == [1] * filled + [0] * (packed.shape[1] - filled)
        assert torch.equal(packed[row, :filled], torch.stack(expected) if expected else packed[row, :0])
        assert (packed[row, filled:] == 0).all()
        if filled:
            assert torch.equal(layout.last_states(packed)[row], expected[-1])
        mean = text[row, real].mean(0) if real.any() else torch.zeros(3)
        torch.testing.assert_close(layout.mean_states(packed)[row], mean)


@settings(max_examples=100, deadline=None)
@given(mask=masks(), num_prefix=st.integers(0, 3), has_suffix=st.booleans())
def test_packing_and_unpacking_is_the_identity_on_real_tokens(mask: Tensor, num_prefix: int, has_suffix: bool) -> None:
    layout = RowLayout.from_mask(mask, num_prefix, has_suffix)
    text = tokens(mask)
    prefix = torch.full((len(mask), num_prefix, 3), -1.0) if num_prefix else None
    packed = layout.pack(prefix, text, torch.full((len(mask), 1, 3), -2.0) if has_suffix else None)
    expected = text.nan_to_num(0.0)
    assert torch.equal(layout.text_states(packed), expected)
    spoilt = packed.masked_fill(layout.attention_mask.unsqueeze(-1) == 0, float("nan"))  # states of padding
    assert torch.equal(layout.text_states(spoilt), expected)
    assert torch.isfinite(layout.mean_states(spoilt)).all()


@settings(max_examples=60, deadline=None)
@given(mask=masks())
def test_labels_are_packed_with_their_own_padding(mask: Tensor) -> None:
    labels = torch.arange(mask.numel()).view(mask.shape)
    packed = RowLayout.from_mask(mask, 2, True).pack_text(labels, fill=-100)
    for row, real in enumerate(mask.bool()):
        assert packed[row].tolist() == labels[row, real].tolist() + [-100] * int((~real).sum())


@settings(max_examples=60, deadline=None)
@given(mask=masks(), num_prefix=st.integers(1, 3))
def test_rows_for_generation_end_at_the_right_edge(mask: Tensor, num_prefix: int) -> None:
    layout = RowLayout.from_mask(mask, num_prefix, False)
    text = tokens(mask)
    rows, rows_mask = layout.pad_left(layout.pack(torch.full((len(mask), num_prefix, 3), -1.0), text, None))
    assert rows.shape[1] == num_prefix + int(mask.sum(1).max())
    for row, real in enumerate(mask.bool()):
        filled = num_prefix + int(real.sum())
        assert rows_mask[row].tolist() == [0] * (rows.shape[1] - filled) + [1] * filled
        expected = torch.cat([torch.full((num_prefix, 3), -1.0), text[row, real]])
        assert torch.equal(rows[row, rows.shape[1] - filled :], expected)
        assert (rows[row, : rows.shape[1] - filled] == 0).all()


def test_a_row_of_prefix_and_suffix_alone() -> None:
    layout = RowLayout.from_mask(torch.zeros(2, 0), 1, True)
    packed = layout.pack(torch.ones(2, 1, 3), torch.zeros(2, 0, 3), torch.full((1, 1, 3), 5.0))
    assert packed[..., 0].tolist() == [[1, 5], [1, 5]]
    assert layout.attention_mask.tolist() == [[1, 1], [1, 1]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_virtual_tokens_take_the_texts_type(dtype: torch.dtype) -> None:
    layout = RowLayout.from_mask(torch.ones(1, 2), 1, True)
    packed = layout.pack(torch.ones(1, 1, 3), torch.ones(1, 2, 3, dtype=dtype), torch.ones(1, 1, 3))
    assert packed.dtype == dtype


def test_padding_takes_no_gradient() -> None:
    mask = torch.tensor([[1, 0, 1]])
    layout = RowLayout.from_mask(mask, 0, False)
    text = torch.full((1, 3, 2), float("nan")).masked_fill(mask.unsqueeze(-1).bool(), 2.0).requires_grad_()
    (layout.pack(None, text, None) ** 2).sum().backward()
    assert text.grad is not None
    assert text.grad.tolist() == [[[4, 4], [0, 0], [4, 4]]]
