"""The settings: defaults, the paper's sizes, ranges, and files."""

import json
from pathlib import Path
from typing import Any

import pytest
from peft import PeftConfig, PeftType, TaskType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from peft_bituning import BiTuningConfig
from peft_bituning.errors import ConfigurationError
from peft_bituning.tuners.bituning.config import sizes_for

SIZES = [
    "num_virtual_tokens",
    "num_experts",
    "encoder_hidden_size",
    "encoder_num_layers",
    "encoder_num_attention_heads",
]
POSITIVE = [*SIZES, "encoder_cross_attention_frequency", "collaborative_dim", "encoder_intermediate_size"]


def sizes_of(config: BiTuningConfig) -> tuple[int, ...]:
    return tuple(getattr(config, name) for name in SIZES)


def test_the_papers_sizes_and_those_that_follow_from_the_width() -> None:
    assert sizes_of(BiTuningConfig()) == (None,) * 5
    assert sizes_of(BiTuningConfig.paper()) == (32, 8, 768, 12, 12)
    assert sizes_of(BiTuningConfig.paper(num_experts=3)) == (32, 3, 768, 12, 12)
    for width, sizes in {64: (8, 4, 128, 2, 4), 576: (8, 4, 128, 2, 4), 2048: (16, 4, 384, 6, 6)}.items():
        config = BiTuningConfig()
        config.fill_sizes(width)
        assert sizes_of(config) == sizes
    assert tuple(sizes_for(4096).values()) == tuple(sizes_for(8192).values()) == (32, 8, 768, 12, 12)
    given = BiTuningConfig(encoder_num_attention_heads=5)
    with pytest.raises(ConfigurationError, match=r"a multiple of encoder_num_attention_heads \(5\), got 128"):
        given.fill_sizes(576)


def test_the_other_defaults() -> None:
    config = BiTuningConfig()
    assert config.prefix_encoder == "mformer"
    assert (config.encoder_cross_attention_frequency, config.encoder_intermediate_size) == (2, None)
    assert (config.router_gradient, config.router_aux_loss_coef) == ("straight_through", 0.01)
    assert (config.pooling, config.encoder_dropout, config.collaborative_dropout) == ("suffix", 0.0, 0.0)
    assert config.collaborative_dim is None and config.modules_to_save is None and config.init_weights is True
    assert config.center_embeddings is False


def test_peft_knows_it() -> None:
    config = BiTuningConfig()
    assert config.peft_type is PeftType.BITUNING  # type: ignore[attr-defined]
    assert PEFT_TYPE_TO_CONFIG_MAPPING[config.peft_type] is BiTuningConfig
    assert not config.is_prompt_learning


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (None, TaskType.FEATURE_EXTRACTION),
        ("FEATURE_EXTRACTION", TaskType.FEATURE_EXTRACTION),
        ("CAUSAL_LM", TaskType.CAUSAL_LM),
        (TaskType.CAUSAL_LM, TaskType.CAUSAL_LM),
    ],
)
def test_no_task_is_feature_extraction(given: Any, found: TaskType) -> None:
    assert BiTuningConfig(task_type=given).task_type == found


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        *[(name, value, "an integer >= 1") for name in POSITIVE for value in (0, -3, 1.5, True, "8")],
        ("encoder_cross_attention_frequency", None, "an integer >= 1"),
        *[
            (name, value, "in [0, 1)")
            for name in ("encoder_dropout", "collaborative_dropout")
            for value in (1.0, -0.1, float("nan"), "0.1")
        ],
        *[("router_aux_loss_coef", value, ">= 0") for value in (-1e-9, float("nan"), "0.01", None)],
        *[
            (name, value, "True or False")
            for name in ("init_weights", "center_embeddings")
            for value in (1, "yes", None)
        ],
        *[("prefix_encoder", value, "the name of a registered encoder") for value in ("", None, 3)],
        ("pooling", "max", "one of suffix, eos, mean, last"),
        ("pooling", None, "one of suffix, eos, mean, last"),
        ("router_gradient", "soft", "one of straight_through, switch, none"),
        ("task_type", "SEQ_CLS", "one of FEATURE_EXTRACTION, CAUSAL_LM"),
        ("encoder_hidden_size", 100, "a multiple of encoder_num_attention_heads (12)"),
    ],
)
def test_a_value_out_of_range_says_field_rule_and_value(field: str, value: Any, rule: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        BiTuningConfig.paper(**{field: value})
    assert str(caught.value) == f"{field} must be {rule}, got {value!r}"


def test_it_round_trips_through_json_alone(tmp_path: Path) -> None:
    config = BiTuningConfig(
        num_virtual_tokens=5,
        prefix_encoder="linear",
        collaborative_dim=7,
        router_gradient="switch",
        router_aux_loss_coef=0,
        collaborative_dropout=0.25,
        pooling="eos",
        init_weights=False,
        center_embeddings=True,
        modules_to_save=["lm_head"],
        task_type="CAUSAL_LM",
    )
    config.save_pretrained(str(tmp_path))
    assert [file.name for file in tmp_path.iterdir()] == ["adapter_config.json"]
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "BITUNING"
    for reader in (BiTuningConfig, PeftConfig):
        loaded = reader.from_pretrained(str(tmp_path))
        assert isinstance(loaded, BiTuningConfig)
        assert loaded.to_dict() == config.to_dict()


def test_an_unknown_key_in_the_file_is_told_and_a_bad_value_refused(tmp_path: Path) -> None:
    BiTuningConfig().save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"from_the_future": 1}))
    with pytest.warns(UserWarning, match="from_the_future"):
        assert BiTuningConfig.from_pretrained(str(tmp_path)).num_virtual_tokens is None
    file.write_text(json.dumps(settings | {"num_experts": 0}))
    with pytest.raises(ConfigurationError, match="num_experts must be an integer >= 1, got 0"):
        PeftConfig.from_pretrained(str(tmp_path))


def test_every_setting_has_a_help_text() -> None:
    own = set(BiTuningConfig.__dataclass_fields__) - set(PeftConfig.__dataclass_fields__)
    assert len(own) == 19
    assert all(BiTuningConfig.__dataclass_fields__[name].metadata["help"] for name in own)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"prefix_token_ids": []}, "prefix_token_ids must be vocabulary ids, at least one, or None, got \\[\\]"),
        ({"prefix_token_ids": [3, -1]}, "prefix_token_ids must be vocabulary ids"),
        ({"prefix_token_ids": "words"}, "prefix_token_ids must be vocabulary ids"),
        ({"prefix_token_ids": [True]}, "prefix_token_ids must be vocabulary ids"),
        ({"prefix_token_ids": [3], "prefix_encoder": "none"}, "must be None for prefix_encoder='none', got \\[3\\]"),
        ({"suffix_token_id": -1}, "suffix_token_id must be a vocabulary id or None, got -1"),
        ({"suffix_token_id": 3, "pooling": "mean"}, "must be None for pooling='mean', got 3"),
    ],
)
def test_token_ids_are_checked(changes: dict[str, Any], rule: str) -> None:
    with pytest.raises(ConfigurationError, match=rule):
        BiTuningConfig(**changes)
