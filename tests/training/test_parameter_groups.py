"""Learning rates apart: who is in which group, what an update moves, what is refused."""

from collections.abc import Callable
from typing import Any

import pytest
from peft import get_peft_model, get_peft_model_state_dict

from peft_bituning import BiTuningConfig
from peft_bituning.base_models import BaseModel
from peft_bituning.errors import ConfigurationError
from peft_bituning.serving import LaserRecommender
from peft_bituning.serving.folder import ITEM_ADAPTER
from peft_bituning.training import LaserArguments
from peft_bituning.training.parameter_groups import parameter_groups

from .conftest import SMALL

Train = Callable[..., LaserRecommender]
IDS = [5, 6]


@pytest.mark.parametrize(
    ("encoder", "prefix"), [("mformer", {"queries", "anchor"}), ("static", {"embeddings"}), ("linear", set())]
)
def test_groups(encoder: str, prefix: set[str], tiny_base: Callable[[], BaseModel]) -> None:
    config = BiTuningConfig(**SMALL, prefix_encoder=encoder, prefix_token_ids=IDS, collaborative_dim=8)
    model = get_peft_model(tiny_base().model, config)
    names = {id(value): name for name, value in model.named_parameters()}
    ratios = {"suffix_lr_ratio": 10.0} | ({"prefix_lr_ratio": 0.5} if prefix else {})
    rest, tokens, suffix = parameter_groups(model, 1e-3, LaserArguments(**ratios))

    assert [group["lr"] for group in (rest, tokens, suffix)] == [1e-3, 5e-4 if prefix else 1e-3, 1e-2]
    assert {names[id(each)].rpartition(".")[2] for each in tokens["params"]} == prefix
    assert ["bituning_suffix" in names[id(each)] for each in suffix["params"]] == [True]
    found = [id(each) for group in (rest, tokens, suffix) for each in group["params"]]
    assert sorted(found) == sorted(id(each) for each in model.parameters() if each.requires_grad)


def test_one_group_without_ratios(tiny_base: Callable[[], BaseModel]) -> None:
    model = get_peft_model(tiny_base().model, BiTuningConfig(**SMALL, collaborative_dim=8))
    (group,) = parameter_groups(model, 1e-3, LaserArguments())
    assert [id(each) for each in group["params"]] == [id(each) for each in model.parameters() if each.requires_grad]


@pytest.mark.parametrize(
    ("adapter", "name"),
    [({"prefix_encoder": "linear"}, "prefix_lr_ratio"), ({"pooling": "mean"}, "suffix_lr_ratio")],
)
def test_a_ratio_of_nothing_is_refused(adapter: dict[str, Any], name: str, train: Train) -> None:
    with pytest.raises(ConfigurationError, match=f"{name} must be 1 for an adapter that trains no such tokens, got 2"):
        train(adapter=adapter, **{name: 2.0})


def test_an_update_moves_them_by_their_rates(train: Train) -> None:
    one_update: dict[str, Any] = {"per_device_train_batch_size": 100, "warmup_ratio": 0.0, "learning_rate": 1e-4}
    model = train(prefix_lr_ratio=3.0, suffix_lr_ratio=10.0, **one_update).model
    after, before = (get_peft_model_state_dict(model, adapter_name=side) for side in ("default", ITEM_ADAPTER))
    steps = {name: float((after[name] - before[name]).abs().max()) for name in before}  # AdamW's first: the rate
    suffix = next(step for name, step in steps.items() if "bituning_suffix" in name)
    queries = next(step for name, step in steps.items() if name.endswith("queries"))
    projection = next(step for name, step in steps.items() if name.endswith("projection.weight"))
    assert (suffix, queries, projection) == pytest.approx((1e-3, 3e-4, 1e-4), rel=0.01)
