"""From histories to a saved side network: it learns from text, the language model is let go, a second call resumes."""

import gc
import weakref

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaModel

from peft_bituning.data import LeaveOneOut
from peft_bituning.errors import ArtifactError
from peft_bituning.evaluation import evaluate_ranking, history_scorer
from peft_bituning.recommenders import Popularity, fit_recommender
from peft_bituning.ssna import SSNA, ItemStates, SSNAConfig, default_ssna_arguments, fit_ssna
from peft_bituning.ssna import fit as fit_module

CONFIG = SSNAConfig(
    num_layers=2,
    adapter_size=64,
    pooling="last",
    hidden_size=32,
    num_hidden_layers=1,
    dropout=0.1,
    attention_dropout=0.1,
)
FIT = {"epochs": 25, "batch_size": 16, "learning_rate": 3e-3}


@pytest.fixture(scope="module")
def fitted(tmp_path_factory, tiny_base_folder, worded_data):
    """Return the model, its report and its folder, and what the language model did after caching."""
    folder = tmp_path_factory.mktemp("ssna")
    forward_passes, alive = [], []
    patch = pytest.MonkeyPatch()

    def load(name):
        base = original_load(name)
        alive.append(weakref.ref(base.model))
        return base

    def train(*arguments, **settings):
        forward_passes.clear()
        gc.collect()
        alive.append(alive[0]() is not None)
        return fit_recommender(*arguments, **settings)

    original_load = fit_module.load_base_model
    patch.setattr(fit_module, "load_base_model", load)
    patch.setattr(fit_module, "fit_recommender", train)
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, inputs, output: forward_passes.append(1) if isinstance(module, LlamaModel) else None
    )
    model, report = fit_ssna(worded_data, tiny_base_folder, folder, CONFIG, **FIT)
    handle.remove()
    patch.undo()
    return model, report, folder, forward_passes, alive


def recall(model, samples, k=6):
    """Return recall@6: six of the 30 items are of the kind that comes next."""
    return evaluate_ranking(history_scorer(model), samples, k=k).metrics()["unfiltered"][f"recall@{k}"]


def test_text_that_tells_the_next_item_is_learned(fitted, worded_data):
    model, report, *_ = fitted
    split = LeaveOneOut(worded_data.histories)
    popularity = Popularity(len(worded_data.items)).fit(split.train_sequences)
    warm = [sample for sample in split.samples("test") if sample.user >= 15]
    assert recall(model, warm) > 0.9 > 0.4 > recall(popularity, warm)
    assert report.losses[-1] < report.losses[0] and report.best_ndcg > 0.4


def test_an_item_never_seen_in_training_is_found_by_its_text(fitted, worded_data):
    model, *_ = fitted
    split = LeaveOneOut(worded_data.histories)
    cold = [sample for sample in split.samples("test") if sample.user < 15]
    trained = {item for sequence in split.train_sequences for item in sequence}
    assert len(cold) == 15 and not trained & {sample.target for sample in cold}
    assert recall(model, cold) > 0.5  # by chance 0.2


def test_the_language_model_is_gone_before_training(fitted):
    _, _, _, forward_passes, alive = fitted
    assert alive[1] is False  # no reference to it is left
    assert forward_passes == []


def test_the_folder_holds_the_model_and_the_states(fitted, worded_data):
    model, _, folder, *_ = fitted
    states = ItemStates.open(folder / "states")
    assert len(states) == len(worded_data.items) and model.config.states == states.origin
    loaded = SSNA.from_pretrained(folder)
    assert loaded.content_hash() == model.content_hash() == loaded.attach(states).content_hash()


def test_a_second_call_reuses_the_states_and_repeats_the_run(fitted, tiny_base, worded_data, tmp_path):
    model, report, folder, *_ = fitted
    base = tiny_base()
    base.model.model.register_forward_pre_hook(lambda *_: pytest.fail("the states were not found"))
    (tmp_path / "states").symlink_to(folder / "states")
    again, same = fit_ssna(worded_data, base, tmp_path, CONFIG, **FIT)
    assert again.content_hash() == model.content_hash() and same.losses == report.losses
    assert all(weight.grad is None for weight in base.model.parameters())
    other, _ = fit_ssna(
        worded_data, base, tmp_path, SSNAConfig(**{**CONFIG.to_dict(), "seed": 1}), **{**FIT, "epochs": 1}
    )
    assert other.content_hash() != model.content_hash()


def test_states_of_another_run_are_refused_and_replaced_where_asked(fitted, tiny_base, tiny_data, tmp_path):
    fit_ssna(tiny_data, tiny_base(), tmp_path, CONFIG, epochs=1)
    config = SSNAConfig(**{**CONFIG.to_dict(), "pooling": "mean"})
    with pytest.raises(ArtifactError, match="pooling was 'last' and is 'mean'"):
        fit_ssna(tiny_data, tiny_base(), tmp_path, config, epochs=1)
    model, _ = fit_ssna(tiny_data, tiny_base(), tmp_path, config, overwrite_states=True, epochs=1)
    assert model.config.pooling == "mean"


def test_default_arguments_are_accepted(tiny_base, tiny_data, tmp_path):
    arguments = {**default_ssna_arguments(), "epochs": 1}
    _, report = fit_ssna(tiny_data, tiny_base(), tmp_path, states_dtype="bfloat16", **arguments)
    assert len(report.losses) == 1 and ItemStates.open(tmp_path / "states").values.dtype == torch.bfloat16
