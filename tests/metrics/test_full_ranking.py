"""The `evaluate` module, really loaded from the package's script."""

import subprocess
import sys

import evaluate
import pytest

from peft_bituning import metrics

SCORES = [[3.0, 2.0, 2.0, 1.0], [1.0, 1.0, 1.0, 1.0], [0.1, 0.4, 0.3, 0.2]]
TARGETS = [1, 0, 0]


@pytest.fixture(scope="module", autouse=True)
def offline_cache(tmp_path_factory):
    """Keep what `evaluate` copies out of the user's cache, and the network out of the test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evaluate.config.HF_EVALUATE_OFFLINE", True)
        patch.setattr("evaluate.config.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


@pytest.mark.parametrize("seen", [None, [[0], [], [1, 2]]])
def test_the_module_equals_the_core(tmp_path, seen):
    module = evaluate.load(metrics.path(), cache_dir=str(tmp_path))
    for k in (2, 10):
        expected = metrics.ranking_metrics(metrics.target_ranks(SCORES, TARGETS, seen), k)
        arguments = {} if k == 10 else {"k": k}
        assert module.compute(predictions=SCORES, references=TARGETS, seen=seen, **arguments) == pytest.approx(expected)
        assert expected.keys() == {f"recall@{k}", f"ndcg@{k}", "mrr"}


def test_batches_can_be_added(tmp_path):
    module = metrics.load(cache_dir=str(tmp_path))
    assert isinstance(module, evaluate.Metric)
    for row, target in zip(SCORES, TARGETS, strict=True):
        module.add_batch(predictions=[row], references=[target])
    assert module.compute()["mrr"] == pytest.approx((1 / 2.5 + 1 / 2.5 + 1 / 4) / 3)


def test_metrics_alone_do_not_import_evaluate():
    code = "import sys, peft_bituning.metrics; sys.exit('evaluate' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
