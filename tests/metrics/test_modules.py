"""The `evaluate` modules, really loaded from the package's folder."""

import evaluate
import pytest

from peft_bituning import metrics
from peft_bituning.errors import ConfigurationError
from peft_bituning.metrics.modules import MODULE_NAMES

SCORES = [[3.0, 2.0, 2.0, 1.0], [1.0, 1.0, 1.0, 1.0], [0.1, 0.4, 0.3, 0.2]]
TARGETS = [1, 0, 0]


@pytest.fixture(scope="module", autouse=True)
def offline_cache(tmp_path_factory):
    """Keep what `evaluate` copies out of the user's cache, and the network out of the test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evaluate.config.HF_EVALUATE_OFFLINE", True)
        patch.setattr("evaluate.config.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


@pytest.mark.parametrize("name", MODULE_NAMES)
def test_modules_equal_the_core(name, tmp_path):
    module = evaluate.load(metrics.path(name), cache_dir=str(tmp_path))
    arguments = {} if name == "mrr" else {"k": 2}
    key = {"recall_at_k": "recall@2", "ndcg_at_k": "ndcg@2", "mrr": "mrr"}[name]
    for seen in (None, [[0], [], [1, 2]]):
        result = module.compute(predictions=SCORES, references=TARGETS, seen=seen, **arguments)
        expected = metrics.ranking_metrics(metrics.target_ranks(SCORES, TARGETS, seen), 2)[key]
        assert result == {key: pytest.approx(expected)}


def test_batches_can_be_added(tmp_path):
    module = metrics.load("mrr", cache_dir=str(tmp_path))
    for row, target in zip(SCORES, TARGETS, strict=True):
        module.add_batch(predictions=[row], references=[target])
    assert module.compute()["mrr"] == pytest.approx((1 / 2.5 + 1 / 2.5 + 1 / 4) / 3)


def test_unknown_module_is_named():
    with pytest.raises(ConfigurationError, match="name must be one of recall_at_k, ndcg_at_k, mrr, got 'map'"):
        metrics.path("map")
