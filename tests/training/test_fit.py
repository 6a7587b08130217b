"""`fit` end to end on tiny data: what it writes, what it keeps, what it leaves alone."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.tracking import GeneralTracker
from matplotlib import image
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from peft_bituning.base_models import load_base_model
from peft_bituning.data import PRESETS
from peft_bituning.errors import ConfigurationError
from peft_bituning.recommenders import load_recommender
from peft_bituning.serving import LaserRecommender

Train = Callable[..., LaserRecommender]


def _results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def _weights(recommender: LaserRecommender, name: str = "default") -> dict[str, torch.Tensor]:
    return {
        key: value.detach().clone()
        for key, value in recommender.model.state_dict().items()
        if f"bituning_prefix.{name}" in key or f"bituning_suffix.{name}" in key
    }


# ---------------------------------------------------------------------- what a whole run writes


def test_rows_of_the_results(trained: Any) -> None:
    results = _results(trained.folder)
    names = [row["name"] for row in results["rows"]]
    assert names == [
        "popularity",
        "item-kNN",
        "frozen ID recommender (sasrec)",
        "text (tf-idf)",
        "hybrid without the language model",
        "untrained LLM (mean of text states)",
        "untrained suffix",
        "after stage 1",
        "after stage 2",
        "hybrid with Laser",
    ]
    measured = [row["test"] for row in results["rows"]] + [row["valid"] for row in results["rows"][-3:-1]]
    measured.append(results["swapped_collaborative"])
    for metrics in measured:
        assert metrics["users"] == len(trained.data)
        for mode in ("unfiltered", "filtered"):
            for name in ("recall@10", "ndcg@10", "mrr"):
                assert 0 <= metrics[mode][name] <= 1
                assert 0 <= metrics[mode][f"{name}_se"] < 0.5


def test_provenance_in_the_results(trained: Any) -> None:
    results = _results(trained.folder)
    assert results["dataset"]["users"] == 30 and results["dataset"]["items"] == 12
    assert results["dataset"]["events"] == trained.data.num_events
    assert results["dataset"]["users_not_evaluated"] == 0
    assert results["prompts"]["twins"] == 0
    assert results["settings"]["seed"] == 0 and results["settings"]["processes"] == 1
    assert results["base_model"] == "tiny-llama" and results["id_recommender"] == "sasrec"
    assert results["adapter"]["num_experts"] == 2
    assert (
        results["parameters"]["trainable"] == sum(value.numel() for value in _weights(trained.recommender).values())
        or results["parameters"]["trainable"] > 0
    )
    assert {"peft_bituning", "torch", "transformers", "peft", "accelerate"} <= results["versions"].keys()
    assert {"recommender", "baselines", "training", "test", "total_this_run"} <= results["seconds"].keys()
    assert all(value >= 0 for value in results["seconds"].values())
    assert results["machine"]["device"] == "cpu"
    assert results["adapter_mb"] == pytest.approx((trained.folder / "adapter_model.safetensors").stat().st_size / 1e6)


def test_epochs_in_the_results(trained: Any) -> None:
    results = _results(trained.folder)
    assert [(record["stage"], record["epoch"]) for record in results["epochs"]] == [(1, 1), (2, 1)]
    for record in results["epochs"]:
        assert sum(record["expert_load"]) == pytest.approx(1.0)
        assert len(record["expert_load"]) == 2
        assert record["train_loss"] == pytest.approx(
            record["train_contrastive_loss"] + 0.01 * record["train_aux_loss"], rel=1e-5
        )
    steps = [record["step"] for record in results["log_history"]]
    assert steps == list(range(1, results["epochs"][-1]["global_step"] + 1))
    assert all(np.isfinite(record["loss"]) and record["tokens"] > 0 for record in results["log_history"])
    kept = results["rows"][-3]
    assert kept["valid"] == results["epochs"][0]["valid"] and kept["epoch"] == 1


def test_curves_are_a_picture(trained: Any) -> None:
    picture = image.imread(trained.folder / "training_curves.png")
    assert picture.ndim == 3 and min(picture.shape[:2]) > 300
    assert picture.std() > 0.05  # not blank


def test_nothing_of_the_run_is_left(trained: Any) -> None:
    assert not (trained.folder / "checkpoints").exists()
    assert not list(trained.folder.rglob("*tmp*"))
    assert not list(trained.folder.rglob("baselines.json"))


def test_table_speaks_the_language_of_the_items_adapter(trained: Any) -> None:
    encoded = torch.from_numpy(trained.recommender.encode_items(normalize_embeddings=True))
    torch.testing.assert_close(encoded, trained.recommender.table.embeddings, atol=1e-5, rtol=0)
    users, items = _weights(trained.recommender), _weights(trained.recommender, "items")
    assert any(not torch.equal(value, items[key.replace("default", "items")]) for key, value in users.items())


def test_collaborative_information_reaches_the_embedding(trained: Any) -> None:
    encoder = trained.recommender.encoder
    histories = [history[:-1] for history in trained.data.histories]
    own = encoder.encode(histories)
    others = encoder.encode(histories, collaborative_histories=histories[1:] + histories[:1])
    assert float((own - others).norm(dim=1).mean()) > 1e-3


def test_stage_2_changed_the_weights(trained: Any) -> None:
    assert _results(trained.folder)["stage2_weight_change"] > 1e-6


def test_frozen_parts_are_untouched(trained: Any) -> None:
    before = load_base_model(trained.base_folder).model.state_dict()
    after = {key: value for key, value in trained.recommender.base.model.state_dict().items() if key in before}
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in after.items())
    assert not any(
        parameter.requires_grad
        for name, parameter in trained.recommender.base.model.named_parameters()
        if name in before
    )
    saved = load_recommender(trained.folder / "recommender").content_hash()
    assert saved == trained.recommender.settings.recommender_hash == trained.recommender.id_recommender.content_hash()


# ---------------------------------------------------------------------- stages


def test_patience_ends_a_stage(train: Train, tmp_path: Path) -> None:
    train(
        stage1_epochs=5, stage2_epochs=4, learning_rate=1e-12, early_stopping_patience=2
    )  # too small to change a rank
    results = _results(tmp_path / "output")
    assert [(record["stage"], record["epoch"]) for record in results["epochs"]] == [
        *((1, epoch) for epoch in (1, 2, 3)),
        *((2, epoch) for epoch in (1, 2, 3)),
    ]
    assert [row["epoch"] for row in results["rows"][-3:-1]] == [1, 1]


def test_best_epoch_is_kept_with_its_table(train: Train, tmp_path: Path) -> None:
    recommender = train(stage1_epochs=4, learning_rate=0.3, early_stopping_patience=1)
    results = _results(tmp_path / "output")
    curve = [record["valid"]["unfiltered"]["ndcg@10"] for record in results["epochs"]]
    assert curve[:-1] == sorted(curve[:-1])  # it ended with the first epoch that was worse, or the last
    stage1, stage2 = results["rows"][-3:-1]
    assert stage1["epoch"] == curve.index(max(curve)) + 1
    assert stage1["valid"]["unfiltered"]["ndcg@10"] == max(curve)
    assert stage2["test"] == stage1["test"] and results["stage2_weight_change"] == 0  # no stage 2
    encoded = torch.from_numpy(recommender.encode_items(normalize_embeddings=True))
    torch.testing.assert_close(encoded, recommender.table.embeddings, atol=1e-5, rtol=0)


def test_without_stage_1_the_table_is_the_untrained_one(train: Train, tmp_path: Path) -> None:
    train(stage1_epochs=0, stage2_epochs=2)
    results = _results(tmp_path / "output")
    rows = {row["name"]: row for row in results["rows"]}
    assert [(record["stage"], record["epoch"]) for record in results["epochs"]] == [(2, 1), (2, 2)]
    assert rows["after stage 1"]["epoch"] == 0
    assert rows["after stage 1"]["test"] == rows["untrained suffix"]["test"]
    assert results["stage2_weight_change"] > 0


def test_accumulation_is_a_larger_batch(train: Train, tmp_path: Path) -> None:
    adapter = {"router_aux_loss_coef": 0.0}  # load is balanced within a micro-batch
    whole = train("whole", adapter, per_device_train_batch_size=8)
    parts = train("parts", adapter, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    left, right = (_results(tmp_path / name)["log_history"] for name in ("whole", "parts"))
    assert len(left) == len(right) == 2  # 13 rows: 8 and 5
    for record, other in zip(left, right, strict=True):
        assert record["loss"] == pytest.approx(other["loss"], abs=1e-6, rel=1e-6)
        assert record["tokens"] == other["tokens"]
    other_weights = _weights(parts)
    for name, value in _weights(whole).items():
        if "key.bias" not in name:  # its gradient is zero but for rounding, of which AdamW makes steps ...
            torch.testing.assert_close(value, other_weights[name], atol=2e-5, rtol=0)
    histories = [["i1", "i2", "i3"], ["i4"]]
    before = whole.encode_users(histories)
    biases = {name: value for name, value in other_weights.items() if "key.bias" in name}
    assert biases and not whole.model.load_state_dict(biases, strict=False).unexpected_keys
    assert np.allclose(whole.encode_users(histories), before, atol=1e-6)  # ... and no embedding sees


def test_gradients_are_clipped_and_reach_the_router(train: Train, tmp_path: Path) -> None:
    norms: list[float] = []
    routers: list[float] = []

    def look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        gradients = [weight.grad for group in optimizer.param_groups for weight in group["params"]]
        assert all(gradient is not None for gradient in gradients)
        norms.append(float(torch.stack([gradient.norm() for gradient in gradients if gradient is not None]).norm()))
        routers.extend(float(gradient.norm()) for gradient in gradients if tuple(gradient.shape) == (2, 8))

    handle = register_optimizer_step_pre_hook(look)
    try:
        train(adapter={"router_aux_loss_coef": 0.0}, max_grad_norm=0.5)
    finally:
        handle.remove()
    logged = [record["grad_norm"] for record in _results(tmp_path / "output")["log_history"]]
    assert min(logged) > 0.5  # what it was before
    assert norms == pytest.approx([0.5] * len(logged), rel=1e-4)
    assert len(routers) == len(logged) and min(routers) > 0


# ---------------------------------------------------------------------- kinds of adapters and inputs


@pytest.mark.parametrize(
    ("encoder", "pooling"),
    [("static", "suffix"), ("static", "last"), ("linear", "mean"), ("none", "suffix"), ("mformer", "eos")],
)
def test_other_adapters(encoder: str, pooling: str, train: Train, tmp_path: Path) -> None:
    collaborative = encoder in ("linear", "mformer")
    settings = {} if collaborative else {"known": None, "id_recommender": "none"}
    trained = train(adapter={"prefix_encoder": encoder, "pooling": pooling}, **settings)
    results = _results(tmp_path / "output")
    names = [row["name"] for row in results["rows"]]
    assert ("frozen ID recommender (precomputed)" in names) == collaborative
    assert (results["swapped_collaborative"] is not None) == collaborative
    assert (results["epochs"][0]["expert_load"] is not None) == (encoder == "mformer")
    assert (trained.id_recommender is not None) == collaborative
    assert len(trained.recommend([["i1", "i2"]], k=3)[0]) == 3
    assert (tmp_path / "output" / "training_curves.png").is_file()


def test_virtual_tokens_start_from_texts(train: Train, tiny_base_folder: Path, tmp_path: Path) -> None:
    trained = train(prefix_text="thing of things", suffix_text="bought next", max_collaborative_states=1)
    config = trained.model.peft_config["default"]
    ids = trained.base.tokenizer("thing of things", add_special_tokens=False)["input_ids"]
    assert config.prefix_token_ids == ids
    assert config.suffix_token_id == trained.base.tokenizer("next", add_special_tokens=False)["input_ids"][-1]
    loaded = LaserRecommender.from_pretrained(tmp_path / "output", base_model=tiny_base_folder, device="cpu")
    assert loaded.settings.max_collaborative_states == 1
    histories = [["i1", "i2", "i3"], ["i4"]]
    assert np.array_equal(loaded.encode_users(histories), trained.encode_users(histories))


@pytest.mark.parametrize(("encoder", "pooling"), [("none", "suffix"), ("mformer", "mean")])
def test_texts_are_for_the_virtual_tokens_there_are(
    encoder: str, pooling: str, train: Train, tiny_base_folder: Path, tmp_path: Path
) -> None:
    trained = train(adapter={"prefix_encoder": encoder, "pooling": pooling}, prefix_text="thing", suffix_text="next")
    config = trained.model.peft_config["default"]
    assert (config.prefix_token_ids is None) == (encoder == "none")
    assert (config.suffix_token_id is None) == (pooling == "mean")
    loaded = LaserRecommender.from_pretrained(tmp_path / "output", base_model=tiny_base_folder, device="cpu")
    assert np.array_equal(loaded.encode_users([["i1", "i2"]]), trained.encode_users([["i1", "i2"]]))


def test_a_text_without_tokens_is_refused(train: Train) -> None:
    with pytest.raises(ConfigurationError, match="prefix_text must hold at least one token, got ''"):
        train(prefix_text="")


def test_saved_recommender_by_its_folder(train: Train, trained: Any, tmp_path: Path) -> None:
    train(data=trained.data, known=None, id_recommender=str(trained.folder / "recommender"))
    assert _results(tmp_path / "output")["id_recommender"] == "sasrec"
    theirs, ours = (load_recommender(folder / "recommender") for folder in (trained.folder, tmp_path / "output"))
    assert theirs.content_hash() == ours.content_hash()


def test_items_by_what_the_recommender_scores_them_by(train: Train, trained: Any, tmp_path: Path) -> None:
    """The setting is kept with the folder: loaded again, the items adapter still speaks the table's language."""
    known = str(trained.folder / "recommender")
    made = train(data=trained.data, known=None, id_recommender=known, item_collaborative="embedding")
    loaded = LaserRecommender.from_pretrained(tmp_path / "output", base_model=trained.base_folder)
    for recommender in (made, loaded):
        encoded = torch.from_numpy(recommender.encode_items(normalize_embeddings=True))
        torch.testing.assert_close(encoded, recommender.table.embeddings, atol=1e-5, rtol=0)
        assert recommender.encoder.settings.item_collaborative == "embedding"


def test_template_from_a_file(train: Train, tmp_path: Path) -> None:
    template = replace(PRESETS["no_instruction"], instruction="Bought so far:")
    (tmp_path / "own.json").write_text(template.to_json())
    recommender = train(
        adapter={"prefix_encoder": "static"}, known=None, id_recommender="none", template=str(tmp_path / "own.json")
    )
    assert recommender.template.instruction == "Bought so far:"


def test_data_frames(train: Train, tmp_path: Path) -> None:
    events = [(user, (int(user) + step) % 6, step) for user in "0123456" for step in range(5)]
    interactions = pd.DataFrame(
        {
            "user_id": [user for user, _, _ in events] + ["0"],
            "item_id": [f"{item:03d}" for _, item, _ in events] + ["unknown"],
            "timestamp": [1_600_000_000 + step for _, _, step in events] + [1_600_000_009],
        }
    )
    items = pd.DataFrame({"item_id": [f"{n:03d}" for n in range(6)], "title": [f"thing {n}" for n in range(6)]})
    recommender = train(
        adapter={"prefix_encoder": "static"}, known=None, id_recommender="none", data=interactions, items=items
    )
    assert recommender.items.item_ids[1] == "001"
    assert _results(tmp_path / "output")["dataset"]["rejected"] == {"unknown_item": 1}
    assert '"unknown_item"' in (tmp_path / "output" / "rejects.jsonl").read_text()


def test_half_precision(train: Train, tmp_path: Path, fresh_accelerate: None) -> None:
    recommender = train(mixed_precision="bf16", stage1_epochs=2, stage2_epochs=1)
    results = _results(tmp_path / "output")
    assert all(np.isfinite(record["loss"]) for record in results["log_history"])
    assert all(value.dtype == torch.float32 for value in _weights(recommender).values())
    assert "_original_forward" not in vars(recommender.model)  # accelerate's wrapper is off
    encoded = torch.from_numpy(recommender.encode_items(normalize_embeddings=True))
    torch.testing.assert_close(encoded, recommender.table.embeddings, atol=0.05, rtol=0)


def test_compiled(train: Train, tmp_path: Path, fresh_accelerate: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """`accelerate launch --dynamo_backend ...` compiles the training forward pass and changes no loss."""
    settings = {"adapter": {"prefix_encoder": "linear"}, "stage1_epochs": 2, "stage2_epochs": 1}
    train("eager", **settings)
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "aot_eager")
    compiled: list[Any] = []
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **kwargs: compiled.append(kwargs) or compile_(model, **kwargs))
    train("compiled", **settings)
    assert [kwargs["backend"] for kwargs in compiled] == ["aot_eager"]
    eager, found = (
        [epoch["train_loss"] for epoch in _results(tmp_path / folder)["epochs"]] for folder in ("eager", "compiled")
    )
    assert found == pytest.approx(eager, abs=1e-5)


class _Notebook(GeneralTracker):
    """Keeps what it is given."""

    name = "notebook"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__()
        self.settings: dict[str, Any] = {}
        self.rows: list[tuple[int, dict[str, float]]] = []

    @property
    def tracker(self) -> "_Notebook":
        return self

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.settings.update(values)

    def log(self, values: dict[str, float], step: int | None = None, **_: Any) -> None:
        self.rows.append((step or 0, values))


def test_a_4_bit_base(train: Train, tiny_base_folder: Path, tmp_path: Path) -> None:
    """A folder of 4-bit weights trains; the catalog is encoded without gradients before the first update."""
    pytest.importorskip("bitsandbytes")
    folder = tmp_path / tiny_base_folder.name
    AutoModelForCausalLM.from_pretrained(
        tiny_base_folder, quantization_config=BitsAndBytesConfig(load_in_4bit=True), device_map="cpu"
    ).save_pretrained(folder)
    load_base_model(tiny_base_folder).tokenizer.save_pretrained(folder)
    recommender = train(base=folder, stage1_epochs=4, learning_rate=5e-3)
    losses = [epoch["train_loss"] for epoch in _results(tmp_path / "output")["epochs"]]
    assert losses[-1] < losses[0]
    again = LaserRecommender.from_pretrained(tmp_path / "output", base_model=folder)
    histories = [["i1", "i8"], ["i9"]]
    assert np.array_equal(again.encode_users(histories), recommender.encode_users(histories))


def test_tracker(train: Train, tmp_path: Path) -> None:
    tracker = _Notebook()
    train(log_with=tracker, logging_steps=2, per_device_train_batch_size=4)
    assert tracker.settings["learning_rate"] == 5e-3 and tracker.settings["max_history"] == "None"
    losses = [(step, values["loss"]) for step, values in tracker.rows if "loss" in values]
    logged = [(record["step"], record["loss"]) for record in _results(tmp_path / "output")["log_history"]]
    assert losses == logged and [step for step, _ in losses] == [2, 4]
    assert [step for step, values in tracker.rows if "valid_ndcg@10" in values] == [4]


def test_tracker_must_be_there(train: Train, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="log_with must be an installed tracker .* got 'nope'"):
        train(log_with="nope")
    assert not (tmp_path / "output").exists()


def test_silent_without_bars(train: Train, capfd: pytest.CaptureFixture[str]) -> None:
    train(adapter={"prefix_encoder": "static"}, known=None, id_recommender="none")
    said = capfd.readouterr()
    assert said.out == ""
    assert not any(label in said.err for label in ("encoding", "stage 1", "validating", "row/s", "update"))


def test_bars(train: Train, capfd: pytest.CaptureFixture[str]) -> None:
    train(adapter={"prefix_encoder": "static"}, known=None, id_recommender="none", disable_tqdm=False)
    said = capfd.readouterr()
    assert said.out == ""
    assert all(label in said.err for label in ("encoding items", "stage 1 epoch 1", "validating epoch 1", "loss="))
