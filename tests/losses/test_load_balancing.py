"""Load balancing against Eqs. 6 and 9-11 of the paper, written again in numpy float64."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_bituning.errors import InputError
from peft_bituning.losses import load_balancing_loss


def reference_row(logits: np.ndarray) -> float:
    """Compute `K sum_j f_j P_j` of one list of items [N, K], item by item."""
    items, experts = logits.shape
    f, p = np.zeros(experts), np.zeros(experts)
    for row in logits:
        scores = np.exp(row) / np.exp(row).sum()  # Eq. 6
        f[scores.argmax()] += 1 / items  # Eq. 10
        p += scores / items  # Eq. 11
    return float(experts * (f * p).sum())  # Eq. 9


def reference(logits: np.ndarray, mask: np.ndarray, scope: str) -> float:
    real = mask.astype(bool)
    if scope == "batch":
        return reference_row(logits[real]) if real.any() else 0.0
    rows = [reference_row(logits[row][real[row]]) for row in range(len(logits)) if real[row].any()]
    return float(np.mean(rows)) if rows else 0.0


@pytest.mark.parametrize("scope", ["batch", "row"])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_it_is_the_papers_equations(scope: str, data: st.DataObject) -> None:
    rows, items, experts = (data.draw(st.integers(1, 5)) for _ in range(3))
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    logits = random.normal(size=(rows, items, experts), scale=2)
    mask = random.random((rows, items)) < data.draw(st.sampled_from([0.0, 0.4, 1.0]))
    loss = load_balancing_loss(torch.tensor(logits), torch.tensor(mask), scope)
    assert loss.dtype == torch.float64
    assert float(loss) == pytest.approx(reference(logits, mask, scope), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("scope", ["batch", "row"])
def test_masked_items_are_inert_whatever_they_hold(scope: str) -> None:
    logits = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1], [0, 0, 0, 0]])
    spoilt = logits.clone()
    spoilt[mask == 0] = torch.tensor([float("nan"), float("inf"), 1e9, -1e9, 0.0])
    spoilt.requires_grad_()
    loss = load_balancing_loss(spoilt, mask, scope)
    assert torch.equal(loss, load_balancing_loss(logits, mask.bool(), scope))
    loss.backward()
    assert spoilt.grad is not None
    assert torch.isfinite(spoilt.grad).all() and (spoilt.grad[mask == 0] == 0).all()


@pytest.mark.parametrize("scope", ["batch", "row"])
def test_rows_without_items_do_not_count(scope: str) -> None:
    logits = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(4, 3, dtype=torch.long)
    mask[1] = mask[3] = 0
    kept = load_balancing_loss(logits[[0, 2]], mask[[0, 2]], scope)
    assert float(load_balancing_loss(logits, mask, scope)) == pytest.approx(float(kept), rel=1e-6)
    assert float(load_balancing_loss(logits, torch.zeros(4, 3), scope)) == 0.0


@pytest.mark.parametrize("scope", ["batch", "row"])
@pytest.mark.parametrize("experts", [1, 2, 8])
def test_even_load_gives_one_and_one_expert_gives_k(scope: str, experts: int) -> None:
    even = torch.eye(experts).repeat(2, 3, 1) * 50  # each expert is the choice of every K-th item
    mask = torch.ones(even.shape[:2])
    assert float(load_balancing_loss(even, mask, scope)) == pytest.approx(1.0, rel=1e-6)
    one = torch.zeros(2, 6, experts)
    one[..., 0] = 50
    assert float(load_balancing_loss(one, torch.ones(2, 6), scope)) == pytest.approx(experts, rel=1e-6)


def test_the_gradient_moves_load_to_the_idle_expert() -> None:
    logits = torch.zeros(1, 4, 3)
    logits[..., 0] = 1.0
    logits.requires_grad_()
    load_balancing_loss(logits, torch.ones(1, 4)).backward()
    assert logits.grad is not None
    assert (logits.grad[..., 0] > 0).all() and (logits.grad[..., 1:] < 0).all()


def test_half_precision_is_computed_in_float32() -> None:
    logits = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(2)).bfloat16()
    loss = load_balancing_loss(logits, torch.ones(2, 3))
    assert loss.dtype == torch.float32
    assert torch.equal(loss, load_balancing_loss(logits.float(), torch.ones(2, 3)))


@pytest.mark.parametrize(
    ("logits", "mask", "scope", "message"),
    [
        ((2, 3), (2, 3), "batch", r"must be \[B, N, K\] and \[B, N\], got \[2, 3\] and \[2, 3\]"),
        ((2, 3, 4), (2, 4), "batch", r"got \[2, 3, 4\] and \[2, 4\]"),
        ((2, 3, 4), (2, 3), "epoch", "scope must be 'batch' or 'row', got 'epoch'"),
    ],
)
def test_wrong_inputs_are_named(logits: tuple[int, ...], mask: tuple[int, ...], scope: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_balancing_loss(torch.zeros(logits), torch.ones(mask), scope)


def test_two_processes_share_f_and_p_and_their_mean_gradient_is_exact(tmp_path: Path) -> None:
    logits = torch.randn(4, 3, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 1, 1], [0, 0, 0]])
    whole = logits.clone().requires_grad_()
    expected = load_balancing_loss(whole, mask)
    expected.backward()
    arguments = (str(tmp_path), logits, mask)
    torch.multiprocessing.start_processes(_worker, args=arguments, nprocs=2, start_method="fork")
    found = [torch.load(f"{tmp_path}/{rank}.pt") for rank in range(2)]
    assert all(float(loss) == pytest.approx(expected.item(), rel=1e-12) for loss, _ in found)
    gradient = torch.cat([gradient for _, gradient in found]) / 2  # as DDP averages what each process got
    assert whole.grad is not None
    torch.testing.assert_close(gradient, whole.grad, rtol=1e-12, atol=1e-15)


def _worker(rank: int, folder: str, logits: torch.Tensor, mask: torch.Tensor) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mine = logits[2 * rank : 2 * rank + 2].clone().requires_grad_()
    loss = load_balancing_loss(mine, mask[2 * rank : 2 * rank + 2], reduce=True)
    loss.backward()
    torch.save((loss.detach(), mine.grad), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()
