"""The contrastive loss against Eq. 8 of the paper, written again in numpy float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_bituning.errors import InputError
from peft_bituning.losses import catalog_contrastive_loss

CHUNKS = [None, 1, 3, 7, 100]


def reference(users: np.ndarray, table: np.ndarray, targets: np.ndarray, temperature: float) -> np.ndarray:
    """Compute each row's `-log softmax(cos / tau)` at its target [B], pair by pair."""
    losses = []
    for user, target in zip(users, targets, strict=True):
        cosines = [user @ item / (np.linalg.norm(user) * np.linalg.norm(item)) for item in table]
        exponents = np.array(cosines) / temperature
        shift = exponents.max()
        losses.append(shift + np.log(np.exp(exponents - shift).sum()) - exponents[target])
    return np.array(losses)


def reference_gradient(users: np.ndarray, table: np.ndarray, targets: np.ndarray, temperature: float) -> np.ndarray:
    """Compute the gradient of the mean loss [B, D] by the chain rule through softmax and cosine."""
    gradient = np.zeros_like(users)
    unit = table / np.linalg.norm(table, axis=1, keepdims=True)
    for row, (user, target) in enumerate(zip(users, targets, strict=True)):
        length = np.linalg.norm(user)
        cosines = unit @ user / length
        weights = np.exp(cosines / temperature - (cosines / temperature).max())
        weights = weights / weights.sum()
        weights[target] -= 1
        tangent = (unit - np.outer(cosines, user / length)) / length  # d cos_i / d user
        gradient[row] = weights @ tangent / temperature / len(users)
    return gradient


def example(seed: int, rows: int = 4, items: int = 9, width: int = 6) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return random.normal(size=(rows, width)), random.normal(size=(items, width)), random.integers(0, items, rows)


@pytest.mark.parametrize("chunk_size", CHUNKS)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), temperature=st.sampled_from([0.02, 0.05, 1.0]), items=st.integers(1, 12))
def test_it_is_the_papers_equation(chunk_size: int | None, seed: int, temperature: float, items: int) -> None:
    users, table, targets = example(seed, items=items)
    given_users = torch.tensor(users, requires_grad=True)
    loss = catalog_contrastive_loss(
        given_users, torch.tensor(table), torch.tensor(targets), temperature, chunk_size=chunk_size
    )
    expected = reference(users, table, targets, temperature)
    assert loss.item() == pytest.approx(expected.mean(), rel=1e-10, abs=1e-10)
    loss.backward()
    assert given_users.grad is not None
    np.testing.assert_allclose(
        given_users.grad, reference_gradient(users, table, targets, temperature), rtol=1e-9, atol=1e-12
    )
    rows = catalog_contrastive_loss(
        given_users, torch.tensor(table), torch.tensor(targets), temperature, chunk_size, reduction="none"
    )
    np.testing.assert_allclose(rows.detach(), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("chunk_size", [None, 4])
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), power=st.integers(-6, 6))
def test_order_of_the_catalog_and_length_of_vectors_do_not_matter(
    chunk_size: int | None, seed: int, power: int
) -> None:
    users, table, targets = (torch.tensor(array) for array in example(seed))
    loss = float(catalog_contrastive_loss(users, table, targets, chunk_size=chunk_size))
    order = torch.randperm(len(table), generator=torch.Generator().manual_seed(seed))
    moved = torch.argsort(order)[targets]
    assert float(catalog_contrastive_loss(users, table[order], moved, chunk_size=chunk_size)) == pytest.approx(loss)
    lengths = 10.0 ** torch.linspace(-power, power, len(table), dtype=torch.float64).unsqueeze(1)
    scaled = catalog_contrastive_loss(users * 10.0**power, table * lengths, targets, chunk_size=chunk_size)
    assert float(scaled) == pytest.approx(loss)


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_the_table_takes_no_gradient(chunk_size: int | None) -> None:
    users, table, targets = (torch.tensor(array) for array in example(0))
    users.requires_grad_()
    table.requires_grad_()
    catalog_contrastive_loss(users, table, targets, chunk_size=chunk_size).backward()
    assert table.grad is None
    assert users.grad is not None and users.grad.abs().sum() > 0


@pytest.mark.parametrize("chunk_size", [None, 4])
def test_a_normalized_table_is_taken_as_it_is(chunk_size: int | None) -> None:
    users, table, targets = (torch.tensor(array) for array in example(2))
    unit = torch.nn.functional.normalize(table, dim=-1)
    expected = catalog_contrastive_loss(users, table, targets, chunk_size=chunk_size)
    found = catalog_contrastive_loss(users, unit, targets, chunk_size=chunk_size, is_normalized=True)
    assert float(found) == pytest.approx(float(expected), rel=1e-12)
    longer = catalog_contrastive_loss(users, 2 * unit, targets, chunk_size=chunk_size, is_normalized=True)
    assert float(longer) != pytest.approx(float(expected), rel=1e-3)


def test_large_products_are_made_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Above 1e8 similarities, by itself; 4 x 9 here."""
    users, table, targets = (torch.tensor(array) for array in example(3))
    widths: list[int] = []
    normalize = torch.nn.functional.normalize
    monkeypatch.setattr(
        "peft_bituning.losses.catalog_contrastive.F.normalize",
        lambda rows, dim: widths.append(len(rows)) or normalize(rows, dim=dim),
    )
    whole = catalog_contrastive_loss(users, table, targets)
    assert widths == [4, 9]
    monkeypatch.setattr("peft_bituning.losses.catalog_contrastive.LARGEST_PRODUCT", 35)
    monkeypatch.setattr("peft_bituning.losses.catalog_contrastive.CHUNK_SIZE", 4)
    widths.clear()
    assert float(catalog_contrastive_loss(users, table, targets)) == pytest.approx(float(whole), rel=1e-12)
    assert widths == [4, 4, 4, 1, 4]


def test_chunks_in_float32_stay_close() -> None:
    """Sums in another order: the tolerance is that of float32 over 20,000 terms at the lowest temperature in use."""
    generator = torch.Generator().manual_seed(0)
    users, table = torch.randn(8, 64, generator=generator), torch.randn(20_000, 64, generator=generator)
    targets = torch.randint(0, 20_000, (8,), generator=generator)
    results = []
    for dtype, chunk_size in ((torch.float64, None), (torch.float32, 1024)):
        given_users = users.to(dtype).requires_grad_()
        loss = catalog_contrastive_loss(given_users, table.to(dtype), targets, 0.02, chunk_size)
        results.append((float(loss.detach()), torch.autograd.grad(loss, given_users)[0].double()))
    (exact, gradient), (found, found_gradient) = results
    assert found == pytest.approx(exact, rel=1e-5)
    assert float((found_gradient - gradient).norm() / gradient.norm()) < 1e-4


def test_without_a_gradient_nothing_is_kept_for_one() -> None:
    users, table, targets = (torch.tensor(array) for array in example(4))
    loss = catalog_contrastive_loss(users, table, targets, chunk_size=3)
    assert loss.grad_fn is None
    assert float(loss) == pytest.approx(float(catalog_contrastive_loss(users, table, targets)))


def test_half_precision_is_computed_in_float32() -> None:
    users, table, targets = (torch.tensor(array) for array in example(1))
    users, table = users.bfloat16(), table.bfloat16()
    loss = catalog_contrastive_loss(users, table, targets)
    assert loss.dtype == torch.float32
    expected = reference(users.double().numpy(), table.double().numpy(), targets.numpy(), 0.05).mean()
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_a_perfect_match_costs_what_the_others_weigh() -> None:
    table = torch.eye(5, dtype=torch.float64)
    loss = catalog_contrastive_loss(table, table, torch.arange(5), temperature=0.05)
    assert float(loss) == pytest.approx(np.log1p(4 * np.exp(-20)), rel=1e-6)  # cosines 1 and 0, four rivals


def test_a_catalog_of_one_item_costs_nothing() -> None:
    users = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    assert float(catalog_contrastive_loss(users, torch.ones(1, 4), torch.zeros(3, dtype=torch.long))) == 0.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"user_embeddings": torch.ones(2, 5)}, r"one D, got \[2, 5\] and \[3, 4\]"),
        ({"user_embeddings": torch.ones(4)}, r"got \[4\] and \[3, 4\]"),
        ({"targets": torch.tensor([0])}, r"targets must be \[B\] = \[2\], got \[1\]"),
        ({"targets": torch.tensor([0, 3])}, r"in \[0, 3\), got 0\.\.3"),
        ({"targets": torch.tensor([-1, 0])}, r"in \[0, 3\), got -1\.\.0"),
        ({"temperature": 0.0}, "temperature must be > 0, got 0.0"),
        ({"temperature": float("nan")}, "temperature must be > 0, got nan"),
        ({"chunk_size": 0}, "chunk_size must be >= 1 or None, got 0"),
        ({"reduction": "sum"}, "reduction must be 'mean' or 'none', got 'sum'"),
    ],
)
def test_wrong_inputs_are_named(changes: dict[str, object], message: str) -> None:
    inputs: dict[str, object] = {
        "user_embeddings": torch.ones(2, 4),
        "item_table": torch.ones(3, 4),
        "targets": torch.tensor([0, 1]),
    }
    with pytest.raises(InputError, match=message):
        catalog_contrastive_loss(**(inputs | changes))
