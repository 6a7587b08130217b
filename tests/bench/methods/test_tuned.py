"""Every way to tune the language model trains under the same two stages."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from bench.cells import forget_checkpoints
from bench.methods import METHODS, KeptWeights, Trial, TrialResult
from bench.methods.frozen_recommenders import frozen_recommender
from bench.methods.trial_run import NothingKnown
from bench.methods.tuned_training import TunedTraining
from bench.methods.tuners import (
    TUNERS,
    build_tuned,
    merge_lora,
    num_trainable,
)
from bench.rivals.knn_vectors import knn_item_vectors

from peft_bituning.assembly import assemble
from peft_bituning.base_models import BaseModel
from peft_bituning.data import Interactions, LeaveOneOut
from peft_bituning.errors import CheckpointError, ConfigurationError
from peft_bituning.metrics import target_ranks
from peft_bituning.recommenders import ItemKNN
from peft_bituning.training.update import Update

SMALL: dict[str, dict[str, Any]] = {
    "laser": {
        "num_virtual_tokens": 2,
        "num_experts": 2,
        "encoder_hidden_size": 16,
        "encoder_num_layers": 2,
        "encoder_num_attention_heads": 2,
    },
    "bituning-linear": {"num_virtual_tokens": 2},
    "bituning-static": {"num_virtual_tokens": 2},
    "prompt-tuning": {"num_virtual_tokens": 2},
    "p-tuning": {"num_virtual_tokens": 2, "encoder_hidden_size": 16},
}
D, LAYERS, INNER, VOCABULARY = 32, 2, 64, 320
_LORA = LAYERS * 8 * (4 * 2 * D + 3 * (D + INNER))
_FULL = VOCABULARY * D + LAYERS * (4 * D * D + 3 * D * INNER + 2 * D) + D
#: weights trained, and weights in an adapter's file: P-tuning's encoder is not in it
COUNTS = {
    "bituning-static": (3 * D, 3 * D),
    "bituning-none": (D, D),
    "prompt-tuning": (2 * D, 2 * D),
    "p-tuning": (2 * D + (D * 16 + 16) + (16 * 16 + 16) + (16 * D + D), 2 * D),
    "lora": (_LORA, _LORA),
    "full": (_FULL, _FULL),
}
FIRST_UPDATE = [3, 1, 5, 7, 8, 9, 6]  # targets of the first update, the same for every method


@pytest.fixture
def make_trial(make_trial: Callable[..., Trial]) -> Callable[..., Trial]:
    """Return the maker of trials, with the small settings of each method."""

    def make(method: str, folder: str = "", settings: Any = None, **changes: Any) -> Trial:
        settings = SMALL.get(method, {}) if settings is None else settings
        return make_trial(method, folder, settings, **changes)

    return make


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Return what training saw: the rows and the loss of every update."""
    seen: list[dict[str, Any]] = []
    run = Update.run

    def spy(self: Update, epoch: Any, rows: Any, where: str) -> dict[str, Any]:
        values = run(self, epoch, rows, where)
        seen.append({"rows": [epoch.samples[row] for row in rows], "loss": values["loss"]})
        return values

    monkeypatch.setattr(Update, "run", spy)
    return seen


@pytest.mark.parametrize("method", TUNERS)
def test_it_trains(method: str, make_trial: Callable[..., Trial], losses: list[dict[str, Any]]) -> None:
    """All over the same rows in the same updates, the epoch chosen by validation."""
    trial = make_trial(method)
    result = METHODS[method].run(trial)
    assert len(result.report.ranks_unfiltered) == len(trial.split.samples("test")) == 13
    assert result.trained == {"epochs": 3, "updates": 6, "rows": 48, "tokens": result.trained["tokens"]}
    assert len(losses) == 6 and all(np.isfinite(each["loss"]) for each in losses)
    expected = trial.split.training_samples("every_cut", 0, 0)[:16]
    drawn = [sample for each in losses[:2] for sample in each["rows"]]
    assert sorted((sample.user, sample.target) for sample in drawn) == sorted(
        (sample.user, sample.target) for sample in expected
    )
    assert [sample.target for sample in losses[0]["rows"]][:7] == FIRST_UPDATE
    curve = [each["valid"]["unfiltered"]["ndcg@10"] for each in result.details["epochs"]]
    assert result.valid is not None and result.valid["unfiltered"]["ndcg@10"] == max(curve[2:] or curve)
    assert set(result.phases) == {"training", "encoding", "user"}
    assert all(phase["seconds"] > 0 and phase["peak_memory_mb"] > 0 for phase in result.phases.values())
    assert result.phases["encoding"]["items"] == 10
    if method in COUNTS:
        assert (result.trainable_parameters, result.adapter_bytes // 4) == COUNTS[method]


@pytest.mark.parametrize("method", ["p-tuning", "ilora"])
def test_a_stopped_run_goes_on(method: str, make_trial: Callable[..., Trial], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a method trains is in the checkpoint: the ranks are those of a run that was never stopped."""
    whole = METHODS[method].run(make_trial(method, "whole"))
    calls = 0

    def stop(self: TunedTraining) -> None:
        nonlocal calls
        original(self)
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt

    original = TunedTraining._save
    with monkeypatch.context() as patched:
        patched.setattr(TunedTraining, "_save", stop)
        with pytest.raises(KeyboardInterrupt):
            METHODS[method].run(make_trial(method, "stopped"))
    resumed = METHODS[method].run(make_trial(method, "stopped", resume=True))
    assert resumed.phases["training"]["resumed"] and not whole.phases["training"]["resumed"]
    np.testing.assert_allclose(resumed.report.ranks_unfiltered, whole.report.ranks_unfiltered)
    assert _losses(resumed) == pytest.approx(_losses(whole), abs=1e-6)
    other = make_trial(method, "stopped", resume=True, temperature=0.1)
    with pytest.raises(CheckpointError, match="temperature was 0.05 and is 0.1"):
        METHODS[method].run(other)
    forget_checkpoints(other.folder)
    assert not (other.folder / "checkpoints").exists()


def _losses(result: TrialResult) -> list[float]:
    return [epoch["train_loss"] for epoch in result.details["epochs"]]


def test_weights_go_out_and_in(make_trial: Callable[..., Trial], tiny_base: Callable[[], BaseModel]) -> None:
    """P-tuning's encoder too, which PEFT's own files leave out."""
    arguments = make_trial("p-tuning").arguments
    first = build_tuned("p-tuning", tiny_base(), SMALL["p-tuning"], None, arguments)
    weights = first.weights_out()
    assert len(weights) == 7 and sum(value.numel() for value in weights.values()) == num_trainable(first)
    second = build_tuned("p-tuning", tiny_base(), SMALL["p-tuning"], None, replace(arguments, seed=1))
    ids = torch.arange(3, 9)[None]
    assert not torch.allclose(second(ids)["pooler_output"], first(ids)["pooler_output"])
    second.weights_in(weights)
    torch.testing.assert_close(second(ids)["pooler_output"], first(ids)["pooler_output"])


def test_virtual_tokens(tiny_base: Callable[[], BaseModel], make_trial: Callable[..., Trial]) -> None:
    arguments = make_trial("lora").arguments
    for method, number in (("lora", 0), ("full", 0), ("prompt-tuning", 2), ("p-tuning", 2), ("bituning-static", 2)):
        model = build_tuned(method, tiny_base(), SMALL.get(method, {}), None, arguments)
        assert model.num_virtual_tokens == number


def test_a_prompt_starts_where_a_prefix_does(
    tiny_base: Callable[[], BaseModel], make_trial: Callable[..., Trial]
) -> None:
    """The text's tokens, repeated; without a text as small as a token's embedding."""
    base, arguments = tiny_base(), replace(make_trial("lora").arguments, prefix_text="a lamp")
    ids = base.tokenizer("a lamp", add_special_tokens=False)["input_ids"]
    settings = {"num_virtual_tokens": len(ids) + 1}
    model = build_tuned("prompt-tuning", base, settings, None, arguments)
    table = base.model.get_input_embeddings().weight
    torch.testing.assert_close(model.model.get_prompt(1)[0], table[torch.tensor([*ids, ids[0]])])
    small = build_tuned("prompt-tuning", tiny_base(), {"num_virtual_tokens": 64}, None, make_trial("lora").arguments)
    assert float(small.model.get_prompt(1).detach().std() / table.std()) == pytest.approx(1, rel=0.15)


def test_refusals(tiny_base: Callable[[], BaseModel], make_trial: Callable[..., Trial]) -> None:
    arguments = make_trial("lora").arguments
    with pytest.raises(ConfigurationError, match="method must be one of laser, .*, got 'dora'"):
        build_tuned("dora", tiny_base(), {}, None, arguments)
    with pytest.raises(ConfigurationError, match="settings of lora must be fields of its adapter's config, got rank"):
        build_tuned("lora", tiny_base(), {"rank": 3}, None, arguments)
    with pytest.raises(ConfigurationError, match="settings of full must be fields .*, got r"):
        build_tuned("full", tiny_base(), {"r": 3}, None, arguments)
    base = tiny_base()
    base.model.to(torch.bfloat16)
    with pytest.raises(ConfigurationError, match="must be in float32 for full fine-tuning, got torch.bfloat16"):
        build_tuned("full", base, {}, None, arguments)
    with pytest.raises(ConfigurationError, match="id_recommender must name one for ilora, .* got 'none'"):
        METHODS["ilora"].run(make_trial("ilora", id_recommender="none"))


@pytest.mark.parametrize(("kind", "model_type"), [("zesrec", "zesrec"), ("fdsa", "fdsa"), ("item-knn", "precomputed")])
def test_other_frozen_recommenders(kind: str, model_type: str, make_trial: Callable[..., Trial]) -> None:
    """Trained once for all trials of a seed, and the states of the prefix are theirs."""
    trial = make_trial("laser", id_recommender=kind, stage1_epochs=1, stage2_epochs=0)
    details = METHODS["laser"].run(trial).details["frozen_recommender"]
    assert details["kind"] == model_type and details["seconds"] > 0
    (folder,) = trial.shared.glob(f"{kind}-*[!n]")
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    known, seconds = frozen_recommender(make_trial("laser", "again", id_recommender=kind), kind, Accelerator())
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp and seconds == details["seconds"]
    by_folder, no_seconds = frozen_recommender(trial, str(folder), Accelerator())
    assert by_folder.content_hash() == known.content_hash() and no_seconds is None
    if kind == "item-knn":
        vectors = knn_item_vectors(ItemKNN(10).fit(trial.split.train_sequences), 10)
        np.testing.assert_array_equal(known.item_weights.numpy(), vectors)
    with pytest.raises(
        ConfigurationError, match="id_recommender must be bert4rec, .*item-knn, or the folder .*got 'gru'"
    ):
        frozen_recommender(trial, "gru", Accelerator())


def test_a_merged_lora_computes_the_same(make_trial: Callable[..., Trial], tiny_base: Callable[[], BaseModel]) -> None:
    trial = replace(make_trial("lora"), keeps_weights=True)
    kept = METHODS["lora"].run(trial).weights
    assert kept is not None
    merged = merge_lora(tiny_base(), {}, kept.users, trial.arguments)
    adapted = build_tuned("lora", tiny_base(), {}, None, trial.arguments).eval()
    ids = torch.randint(0, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(0))
    fresh = adapted(input_ids=ids)["pooler_output"]
    adapted.weights_in(kept.users)
    expected = adapted(input_ids=ids)["pooler_output"]
    found = merged.model.base_model(input_ids=ids).last_hidden_state[:, -1]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (fresh - expected).abs().max() > 1e-3
    assert merged.name != tiny_base().name and not any(each.requires_grad for each in merged.model.parameters())
    assert not any("lora" in name for name, _ in merged.model.named_parameters())


@pytest.mark.parametrize("method", ["laser", "p-tuning"])
def test_it_starts_from_what_another_kept(
    method: str,
    make_trial: Callable[..., Trial],
    losses: list[dict[str, Any]],
    tiny_data: Interactions,
) -> None:
    """Untrained: items by A, users by A', all of them cold; trained: the first update meets A', not fresh weights."""
    kept = METHODS[method].run(replace(make_trial(method, "source"), keeps_weights=True)).weights
    assert kept is not None and kept.users.keys() == kept.items.keys()
    assert any(not torch.equal(kept.users[name], value) for name, value in kept.items.items())
    assert KeptWeights.from_tensors(kept.to_tensors()).content_hash() == kept.content_hash()
    del losses[:]
    split = LeaveOneOut(tiny_data.histories)
    target = replace(make_trial(method, "target"), data=tiny_data, split=split.drawn(0), start=kept)
    result = METHODS[method].run(target)
    assert losses == [] and result.weights is None and result.details["best_epoch"] == 0
    assert result.trained == {"epochs": 0, "updates": 0, "rows": 0, "tokens": 0}
    assert result.details["frozen_recommender"] is None
    assert len(list(target.shared.glob("sasrec-*.json"))) == (method == "laser")  # the source's; nobody trained another
    users, items = _encoded(target, kept.users, True), _encoded(target, kept.items, False)
    scores = users @ items.T  # [U, I]
    ranks = target_ranks(scores, [sample.target for sample in split.samples("test")])
    np.testing.assert_allclose(result.report.ranks_unfiltered, ranks)

    few = replace(make_trial(method, "few"), data=tiny_data, split=split.drawn(0.2), start=kept)
    started = METHODS[method].run(few)
    anew = METHODS[method].run(replace(few, start=None, arguments=make_trial(method, "anew").arguments))
    drawn = {sample.user for each in losses for sample in each["rows"]}
    assert drawn <= split.drawn(0.2).training_users and len(drawn) == 6
    assert started.details["epochs"][0]["train_loss"] != anew.details["epochs"][0]["train_loss"]
    with pytest.raises(CheckpointError, match="start was"):
        METHODS[method].run(replace(few, start=None, arguments=replace(few.arguments, resume=True)))
    with pytest.raises(ConfigurationError, match="must have users to train on, or weights to start from, got neither"):
        METHODS[method].run(replace(target, start=None))


def _encoded(trial: Trial, weights: dict[str, torch.Tensor], users: bool, normalize: bool = True) -> torch.Tensor:
    """Encode test users or items one by one, without this room's training."""
    base, arguments = trial.load_base(), trial.arguments
    width = 64
    model = build_tuned(trial.method, base, trial.settings, NothingKnown(width), arguments)
    model.weights_in(weights)
    known = NothingKnown(width) if model.needs_collaborative else None
    encoder = assemble(base, model, trial.data.items, known, arguments.template, arguments.history)
    prompts = encoder.collator.prompts
    histories = [list(sample.history) for sample in trial.split.samples("test")]
    if not users:
        histories = [[item] for item in range(trial.num_items)]
    rows = []
    model.eval()
    for history in histories:
        inputs: dict[str, Any] = {"input_ids": torch.tensor([prompts.encode(history, "user" if users else "item")])}
        if trial.method == "laser":
            inputs["collaborative_embeds"] = torch.full((1, 1, width), float("nan"))
            inputs["collaborative_mask"] = torch.zeros(1, 1, dtype=torch.bool)
        with torch.no_grad():
            rows.append(model(**inputs)["pooler_output"][0])
    return torch.nn.functional.normalize(torch.stack(rows), dim=1) if normalize else torch.stack(rows)


def test_any_method_can_be_centered(make_trial: Callable[..., Trial], tiny_base: Callable[[], BaseModel]) -> None:
    """By the mean of the items that A encoded, which users are centered by too; it goes where the weights go."""
    trial = replace(make_trial("lora", "source", {"center_embeddings": True}), keeps_weights=True)
    kept = METHODS["lora"].run(trial).weights
    assert kept is not None
    name = "embedding_center.weight"
    assert torch.equal(kept.users[name], kept.items[name]) and kept.users[name].any()
    items = _encoded(trial, kept.items, False, normalize=False)
    torch.testing.assert_close(items.mean(0), torch.zeros(D), atol=1e-5, rtol=0)
    assert any(not torch.equal(kept.users[each], value) for each, value in kept.items.items())

    target = replace(make_trial("lora", "target", {"center_embeddings": True}), start=kept)
    target = replace(target, split=target.split.drawn(0))
    result = METHODS["lora"].run(target)
    scores = _encoded(target, kept.users, True) @ _encoded(target, kept.items, False).T
    ranks = target_ranks(scores, [sample.target for sample in target.split.samples("test")])
    np.testing.assert_allclose(result.report.ranks_unfiltered, ranks)
    with pytest.raises(ConfigurationError, match="settings of ilora must be fields .*, got center_embeddings"):
        METHODS["ilora"].run(make_trial("ilora", "ilora", {"center_embeddings": True}))
