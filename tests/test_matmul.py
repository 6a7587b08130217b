"""The faster matrix product: never less exact than promised, never left switched on."""

import logging
from collections.abc import Iterator

import pytest
import torch

from peft_bituning import matmul
from peft_bituning.matmul import TOLERANCE, fast_cpu_matmul

BACKEND = torch.backends.mkldnn.matmul


@pytest.fixture(autouse=True, params=["none", "ieee"])
def before(request: pytest.FixtureRequest) -> Iterator[str]:
    """Set what was there before, and take it back afterwards."""
    found = BACKEND.fp32_precision
    BACKEND.fp32_precision = request.param
    yield BACKEND.fp32_precision
    BACKEND.fp32_precision = found


def test_the_setting_comes_back(before: str) -> None:
    with fast_cpu_matmul() as on:
        assert (BACKEND.fp32_precision != before) == on
    assert BACKEND.fp32_precision == before


def test_it_comes_back_after_an_error(before: str) -> None:
    with pytest.raises(KeyError, match="inside"), fast_cpu_matmul():
        raise KeyError("inside")
    assert BACKEND.fp32_precision == before


def test_within_each_other(before: str) -> None:
    with fast_cpu_matmul() as outer:
        inside = BACKEND.fp32_precision
        with fast_cpu_matmul() as inner:
            assert inner == outer
        assert BACKEND.fp32_precision == inside
    assert BACKEND.fp32_precision == before


@pytest.mark.parametrize(("rows", "width", "columns"), [(64, 576, 1536), (7, 300, 5), (1, 32, 97)])
def test_products_stay_within_the_tolerance(rows: int, width: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(1)
    left = torch.randn(rows, width, generator=generator)
    right = torch.randn(columns, width, generator=generator)
    with fast_cpu_matmul():
        found = torch.nn.functional.linear(left, right).double()
    exact = left.double() @ right.double().T
    assert float((found - exact).norm() / exact.norm()) < TOLERANCE


def test_a_cpu_on_which_it_is_inexact_stays_off(
    before: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(matmul, "TOLERANCE", -1.0)
    caplog.set_level(logging.INFO, logger="peft_bituning.matmul")
    with fast_cpu_matmul() as on:
        assert not on
        assert BACKEND.fp32_precision == before
    assert "fast CPU matmul is off: its relative error here is" in caplog.text


def test_not_asked_for_it_does_nothing(before: str) -> None:
    with fast_cpu_matmul(False) as on:
        assert not on
        assert BACKEND.fp32_precision == before


def test_the_probe_leaves_the_random_state_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    with fast_cpu_matmul():
        assert torch.equal(torch.rand(3), expected)
