"""The registry of encoders, and what is done to collaborative inputs before an encoder sees them."""

from collections.abc import Callable

import pytest
import torch

from peft_bituning import BiTuningConfig, PrefixEncoder, prefix_encoders, register_prefix_encoder
from peft_bituning.errors import ConfigurationError, InputError
from peft_bituning.tuners.bituning.encoders import build_prefix_encoder
from peft_bituning.tuners.rows.collaborative import fill_cold_rows, masked_mean

Config = Callable[..., BiTuningConfig]


def test_the_four_encoders_are_registered() -> None:
    assert {"mformer", "linear", "static", "none"} <= set(prefix_encoders())


def test_an_unknown_encoder_names_the_known_ones(make_config: Config) -> None:
    with pytest.raises(ConfigurationError, match="must be one of .*linear.*mformer.*none.*static.*, got 'lstm'"):
        build_prefix_encoder(make_config(prefix_encoder="lstm"), 32, 0.02)


def test_a_name_belongs_to_one_class() -> None:
    class Other(PrefixEncoder):
        pass

    with pytest.raises(ConfigurationError, match="names must be unique, got 'mformer', which .*MFormer already has"):
        register_prefix_encoder("mformer")(Other)


def test_registering_a_class_twice_is_fine() -> None:
    class Again(PrefixEncoder):
        pass

    assert register_prefix_encoder("test_again")(Again) is Again
    assert register_prefix_encoder("test_again")(Again) is Again


def test_an_encoder_must_say_what_it_does(make_config: Config) -> None:
    with pytest.raises(NotImplementedError):
        PrefixEncoder(make_config(), 32, 0.02)(1, None, None)


@pytest.mark.parametrize("name", ["static", "none"])
def test_encoders_without_collaborative_information_ignore_it(make_config: Config, name: str) -> None:
    encoder = build_prefix_encoder(make_config(prefix_encoder=name), 32, 0.02)
    assert encoder.read(2, torch.full((2, 1, 9), torch.nan), None) == (None, None)


@pytest.mark.parametrize("name", ["mformer", "linear"])
@pytest.mark.parametrize(
    ("embeds", "mask", "message"),
    [
        (None, None, r"must be given to prefix_encoder='{name}', got None; .*\[B, N, 6\].*zeros for rows that have"),
        ((2, 3, 5), None, r"must be \[B, N, C\] = \[2, N, 6\], got \[2, 3, 5\]"),
        ((3, 3, 6), None, r"must be \[B, N, C\] = \[2, N, 6\], got \[3, 3, 6\]"),
        ((2, 6), None, r"must be \[B, N, C\] = \[2, N, 6\], got \[2, 6\]"),
        ((2, 3, 6), (2, 4), r"collaborative_mask must be \[B, N\] = \[2, 3\], got \[2, 4\]"),
    ],
)
def test_wrong_collaborative_inputs_are_named(
    make_config: Config, name: str, embeds: tuple[int, ...] | None, mask: tuple[int, ...] | None, message: str
) -> None:
    encoder = build_prefix_encoder(make_config(prefix_encoder=name), 32, 0.02)
    with pytest.raises(InputError, match=message.format(name=name)):
        encoder.read(2, None if embeds is None else torch.ones(embeds), None if mask is None else torch.ones(mask))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_real_item_that_is_not_finite_names_its_row(make_config: Config, value: float) -> None:
    encoder = build_prefix_encoder(make_config(), 32, 0.02)
    embeds, mask = torch.ones(4, 3, 6), torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 1], [0, 0, 0]])
    embeds[1, 0, 2] = embeds[2, 2, 0] = value
    embeds[0, :, :] = embeds[3, 0, 0] = 0.5
    embeds[1, 2, :] = embeds[3, 1, :] = value  # padding: does not matter
    with pytest.raises(InputError, match=r"finite at real items, got NaN or infinity in rows \[1, 2\]; check the rec"):
        encoder.read(4, embeds, mask)


def test_no_mask_means_all_items_and_no_items_mean_cold_rows(make_config: Config) -> None:
    encoder = build_prefix_encoder(make_config(), 32, 0.02)
    embeds, mask = encoder.read(2, torch.ones(2, 3, 6), None)
    assert embeds is not None and mask is not None and mask.all() and mask.dtype == torch.bool
    embeds, mask = encoder.read(2, torch.ones(2, 0, 6), None)
    assert embeds is not None and mask is not None
    assert embeds.shape == (2, 1, 6) and not mask.any()
    assert encoder(2, embeds, mask).embeddings.shape == (2, 3, 32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_inputs_take_the_encoders_type(make_config: Config, dtype: torch.dtype) -> None:
    encoder = build_prefix_encoder(make_config(), 32, 0.02).to(torch.bfloat16)
    embeds, mask = encoder.read(2, torch.ones(2, 3, 6, dtype=dtype), None)
    assert embeds is not None and embeds.dtype == torch.bfloat16
    assert encoder(2, embeds, mask).embeddings.dtype == torch.bfloat16


def test_dropout_hides_whole_rows_in_training_only(make_config: Config) -> None:
    encoder = build_prefix_encoder(make_config(collaborative_dropout=0.25), 32, 0.02)
    mask = torch.ones(4000, 3, dtype=torch.bool)
    mask[:, 2] = False
    torch.manual_seed(0)
    dropped = encoder.train().drop(mask)
    whole = (dropped == mask).all(1)
    assert (dropped[~whole] == 0).all()
    assert 0.22 < float((~whole).float().mean()) < 0.28
    assert torch.equal(encoder.eval().drop(mask), mask)
    never = build_prefix_encoder(make_config(), 32, 0.02).train()
    assert torch.equal(never.drop(mask), mask)


def test_cold_rows_get_null_as_their_only_item() -> None:
    null, mask = torch.full((2,), 9.0), torch.tensor([[False, True], [False, False]])
    embeds, filled = fill_cold_rows(torch.zeros(2, 2, 2), mask, null)
    assert embeds.tolist() == [[[0, 0], [0, 0]], [[9, 9], [0, 0]]]
    assert filled.tolist() == [[False, True], [True, False]]


def test_masked_mean_by_hand() -> None:
    values = torch.tensor([[[1.0], [3.0], [100.0]], [[5.0], [7.0], [9.0]]])
    assert masked_mean(values, torch.tensor([[True, True, False], [False, False, True]])).tolist() == [[2.0], [9.0]]
