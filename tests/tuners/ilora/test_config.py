"""Settings: the paper's defaults, ranges, and what of LoRA cannot be gated."""

import re
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, PeftConfig, PeftType, TaskType

from peft_bituning import ILoRAConfig
from peft_bituning.errors import ConfigurationError


def test_the_papers_defaults() -> None:
    config = ILoRAConfig()
    assert (config.r, config.lora_alpha, config.num_experts, config.lora_dropout) == (8, 32, 4, 0.1)
    assert config.target_modules == "all-linear"
    assert (config.gate_pooling, config.pooling, config.collaborative_dim) == ("last", "last", None)
    assert config.peft_type == PeftType("ILORA") and config.task_type == TaskType.FEATURE_EXTRACTION
    assert isinstance(config, LoraConfig)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 6}, "r must be a multiple of num_experts (4), got 6; every expert has the same share"),
        ({"r": 0}, "r must be an integer >= 1, got 0"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern['q_proj'] must be a multiple of num_experts (4), got 2"),
        ({"num_experts": 0}, "num_experts must be an integer >= 1, got 0"),
        ({"num_experts": True}, "num_experts must be an integer >= 1, got True"),
        ({"collaborative_dim": -1}, "collaborative_dim must be an integer >= 1, got -1"),
        ({"lora_alpha": 0}, "lora_alpha must be > 0, got 0"),
        ({"lora_dropout": 1.0}, "lora_dropout must be in [0, 1), got 1.0"),
        ({"collaborative_dropout": -0.1}, "collaborative_dropout must be in [0, 1), got -0.1"),
        ({"gate_pooling": "first"}, "gate_pooling must be one of last, mean, got 'first'"),
        ({"pooling": "eos"}, "pooling must be one of last, mean, suffix, got 'eos'"),
        ({"task_type": "SEQ_CLS"}, "task_type must be one of FEATURE_EXTRACTION, CAUSAL_LM, got 'SEQ_CLS'"),
        ({"bias": "all"}, "bias must be 'none', got 'all'; iLoRA trains its experts and its gate alone"),
        ({"use_dora": True}, "use_dora must be False in ILoRAConfig, got True; leave it out"),
        ({"lora_bias": True}, "lora_bias must be False in ILoRAConfig, got True; leave it out"),
        ({"target_parameters": ["weight"]}, "target_parameters must be None in ILoRAConfig, got ['weight']; leave"),
        ({"layer_replication": [(0, 1)]}, "layer_replication must be None in ILoRAConfig, got [(0, 1)]; leave"),
        (
            {"init_lora_weights": "pissa"},
            "init_lora_weights must be True, False or 'gaussian', got 'pissa'; the others",
        ),
    ],
)
def test_wrong_settings_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        ILoRAConfig(**changes)


def test_files_keep_the_settings(tmp_path: Path) -> None:
    config = ILoRAConfig(r=16, num_experts=8, collaborative_dim=64, pooling="suffix", rank_pattern={"q_proj": 8})
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is ILoRAConfig and loaded == config
