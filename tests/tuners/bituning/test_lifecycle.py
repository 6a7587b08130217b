"""Every step of an adapter's life that PEFT offers, as PEFT's own methods go through it."""

import copy
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForFeatureExtraction,
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    get_peft_model_state_dict,
)
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from peft_bituning import BiTuningConfig, BiTuningModel, PrefixEncoder, register_prefix_encoder
from peft_bituning.errors import AdapterLoadError, ConfigurationError, UnsupportedOperationError
from peft_bituning.tuners.bituning.encoders import Prefix
from peft_bituning.tuners.bituning.layer import VirtualTokens

TENSORS = "adapter_model.safetensors"
TASKS = ["FEATURE_EXTRACTION", "CAUSAL_LM"]
ENCODERS = ["mformer", "linear", "static", "none"]


@pytest.fixture(params=TASKS)
def task(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def make_model(task: str, make_model: Callable[..., PeftModel]) -> Callable[..., PeftModel]:
    """Return the maker of Bi-Tuned Llamas, for each of the two tasks."""
    return lambda *args, **changes: make_model(*args, **({"task_type": task} | changes))


@pytest.fixture
def make_config(task: str, make_config: Callable[..., BiTuningConfig]) -> Callable[..., BiTuningConfig]:
    return lambda **changes: make_config(**({"task_type": task} | changes))


def stir(model: nn.Module, adapter: str = "default") -> None:
    """Change every weight of an adapter, as training would."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if f".{adapter}." in name:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def embed(model: PeftModel, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model.eval()(**inputs).pooler_output


# ---------------------------------------------------------------------- making one


def test_get_peft_model(make_model: Callable, make_llm: Callable, task: str) -> None:
    model = make_model()
    assert type(model) is {"FEATURE_EXTRACTION": PeftModelForFeatureExtraction, "CAUSAL_LM": PeftModelForCausalLM}[task]
    assert isinstance(model.base_model, BiTuningModel)
    assert model.active_adapter == "default"
    base = dict(make_llm().named_parameters())
    for name, parameter in model.get_base_model().named_parameters():
        assert parameter.requires_grad == ("bituning_" in name)
        if "bituning_" not in name:
            assert torch.equal(parameter, base[name])


def test_counts_and_status(make_model: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_model(prefix_encoder="static")
    model.print_trainable_parameters()
    total = sum(parameter.numel() for parameter in model.parameters())
    assert f"trainable params: 128 || all params: {total:,}" in capsys.readouterr().out  # (3 + 1) x 32
    status = model.get_model_status()
    assert (status.peft_types, status.trainable_params, status.enabled) == ({"default": "BITUNING"}, 128, True)
    assert (status.active_adapters, status.available_adapters, status.merged_adapters) == (["default"], ["default"], [])
    assert status.requires_grad == {"default": True}
    (layer,) = model.get_layer_status()
    assert layer.name == "model.virtual_tokens" and layer.module_type == "VirtualTokens"


@pytest.mark.parametrize("name", ["router", "weight", "model", "virtual_tokens", "bituning_prefix", "qformer", "0"])
def test_names_that_are_parts_of_parameters_are_refused(make_model: Callable, name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"must not be part of a parameter's name, got '{name}'; choose"):
        make_model(adapter_name=name)


@pytest.mark.parametrize("name", ["a.b", ""])
def test_names_with_dots_are_refused(make_model: Callable, name: str) -> None:
    with pytest.raises((ConfigurationError, ValueError)):
        make_model(adapter_name=name)


def test_names_are_checked_against_the_other_adapters_too(make_model: Callable, make_config: Callable) -> None:
    """PEFT cuts every key with another adapter's name in it out of a file."""
    model = make_model()
    with pytest.raises(ConfigurationError, match="got 'router'; choose another"):
        model.add_adapter("router", make_config(prefix_encoder="static"))
    static = make_model(prefix_encoder="static", adapter_name="router")
    with pytest.raises(ConfigurationError, match="got 'router'; choose another"):
        static.add_adapter("default", make_config())


def test_a_config_of_another_method_is_refused(make_llm: Callable) -> None:
    from peft import LoraConfig

    with pytest.raises(ConfigurationError, match="peft_config must be a BiTuningConfig, got LoraConfig"):
        BiTuningModel(make_llm(), LoraConfig(target_modules=["q_proj"]), "default")


# ---------------------------------------------------------------------- files


@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_fresh_base_gives_the_same_bits(
    make_model: Callable, make_llm: Callable, make_inputs: Callable, tmp_path: Path, encoder: str
) -> None:
    model, inputs = make_model(prefix_encoder=encoder), make_inputs()
    stir(model)
    expected = embed(model, inputs)
    model.save_pretrained(tmp_path)
    torch.manual_seed(99)
    loaded = PeftModel.from_pretrained(make_llm(), tmp_path)
    assert torch.equal(embed(loaded, inputs), expected)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    renamed = PeftModel.from_pretrained(make_llm(), tmp_path, adapter_name="items", is_trainable=True)
    assert torch.equal(embed(renamed, inputs), expected)
    assert renamed.active_adapter == "items"
    assert {name for name, each in renamed.named_parameters() if each.requires_grad} == {
        name.replace(".default.", ".items.") for name, each in model.named_parameters() if each.requires_grad
    }


@pytest.mark.parametrize("pooling", ["suffix", "eos", "mean", "last"])
def test_the_adapter_does_not_depend_on_the_base_class(
    make_model: Callable, make_llm: Callable, make_inputs: Callable, tmp_path: Path, task: str, pooling: str
) -> None:
    if task == "CAUSAL_LM":
        pytest.skip("PEFT puts an adapter of this task around a model with a head only")
    model, inputs = make_model(pooling=pooling), make_inputs()
    stir(model)
    model.save_pretrained(tmp_path / "from_causal")
    headless = PeftModel.from_pretrained(make_llm().model, tmp_path / "from_causal")
    assert torch.equal(embed(headless, inputs), embed(model, inputs))
    headless.save_pretrained(tmp_path / "from_headless")
    back = PeftModel.from_pretrained(make_llm(), tmp_path / "from_headless")
    assert torch.equal(embed(back, inputs), embed(model, inputs))


def test_the_files_hold_the_adapter_alone(make_model: Callable, tmp_path: Path) -> None:
    model = make_model()
    model.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {TENSORS, "adapter_config.json", "README.md"}
    tensors = load_file(tmp_path / TENSORS)
    own = {name: each for name, each in model.state_dict().items() if "bituning_" in name}
    assert {name.replace(".default", "") for name in own} == set(tensors)
    assert sum(each.numel() for each in tensors.values()) == model.get_nb_trainable_parameters()[0]
    assert tensors["base_model.model.virtual_tokens.bituning_prefix.router.weight"].shape == (4, 6)  # [K, C]
    assert tensors["base_model.model.virtual_tokens.bituning_prefix.queries"].shape == (4, 3, 16)  # [K, P, H]
    assert tensors["base_model.model.virtual_tokens.bituning_suffix.weight"].shape == (1, 32)
    assert all(name.count("bituning_") == 1 for name in tensors)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "BITUNING"
    assert get_peft_model_state_dict(model).keys() == tensors.keys()


def test_a_resized_vocabulary(make_model: Callable, make_llm: Callable, make_inputs: Callable, tmp_path: Path) -> None:
    """PEFT puts resized embeddings into the adapter's file, for a base of the same size; it can be told not to."""
    make_llm().save_pretrained(tmp_path / "base")
    llm, inputs = make_llm(), make_inputs()
    llm.resize_token_embeddings(101, mean_resizing=False)
    llm.name_or_path = str(tmp_path / "base")
    model = make_model(llm)
    inputs["input_ids"][0, 0] = 100
    with pytest.warns(UserWarning, match="the embedding layer has been resized"):
        model.save_pretrained(tmp_path / "adapter")
    kept = load_file(tmp_path / "adapter" / TENSORS)
    assert {tuple(value.shape) for name, value in kept.items() if "bituning_" not in name} == {(101, 32)}
    larger = make_llm(seed=1)
    larger.resize_token_embeddings(101, mean_resizing=False)
    larger.model.layers.load_state_dict(llm.model.layers.state_dict())
    assert torch.equal(embed(PeftModel.from_pretrained(larger, tmp_path / "adapter"), inputs), embed(model, inputs))
    with pytest.raises(AdapterLoadError, match=r"embed_tokens.weight: file \[101, 32\], model \[97, 32\]"):
        PeftModel.from_pretrained(make_llm(), tmp_path / "adapter")
    model.save_pretrained(tmp_path / "small", save_embedding_layers=False)
    assert all("bituning_" in name for name in load_file(tmp_path / "small" / TENSORS))


@pytest.mark.parametrize("low", [False, True])
def test_low_cpu_mem_usage(
    make_model: Callable, make_llm: Callable, make_inputs: Callable, tmp_path: Path, low: bool
) -> None:
    model, inputs = make_model(), make_inputs()
    stir(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_llm(), tmp_path, low_cpu_mem_usage=low)
    assert not any(parameter.is_meta for parameter in loaded.parameters())
    assert torch.equal(embed(loaded, inputs), embed(model, inputs))
    loaded.load_adapter(tmp_path, "second", low_cpu_mem_usage=low)
    loaded.set_adapter("second")
    assert torch.equal(embed(loaded, inputs), embed(model, inputs))


def test_auto_classes(
    make_model: Callable, make_llm: Callable, make_inputs: Callable, tmp_path: Path, task: str
) -> None:
    auto = {"FEATURE_EXTRACTION": AutoPeftModelForFeatureExtraction, "CAUSAL_LM": AutoPeftModelForCausalLM}[task]
    llm, inputs = make_llm(), make_inputs()
    llm.save_pretrained(tmp_path / "base")
    llm.name_or_path = str(tmp_path / "base")
    model = make_model(llm)
    model.save_pretrained(tmp_path / "adapter")
    loaded = auto.from_pretrained(tmp_path / "adapter")
    assert torch.equal(embed(loaded, inputs), embed(model, inputs))


def change(folder: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / TENSORS)
    edit(tensors)
    save_file(tensors, folder / TENSORS)


ROOT = "base_model.model.virtual_tokens.bituning_prefix"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensors: tensors.pop(f"{ROOT}.router.weight"), "missing: .*bituning_prefix.default.router.weight"),
        (lambda tensors: tensors.clear(), r"tensors expected, 0 in the file\); missing: .* and \d+ more"),
        (
            lambda tensors: tensors.update({f"{ROOT}.extra": torch.ones(1)}),
            "unexpected: base_model.model.virtual_tokens.bituning_prefix.extra",
        ),
        (
            lambda tensors: tensors.update({f"{ROOT}.router.weight": torch.ones(5, 6)}),
            r"of another shape: .*default.router.weight: file \[5, 6\], model \[4, 6\]",
        ),
    ],
    ids=["missing", "empty", "extra", "mis-shaped"],
)
def test_tensors_that_do_not_fit_are_an_error(
    make_model: Callable, make_llm: Callable, tmp_path: Path, edit: Callable, message: str
) -> None:
    model = make_model()
    model.save_pretrained(tmp_path)
    change(tmp_path, edit)
    with pytest.raises(AdapterLoadError, match=message):
        PeftModel.from_pretrained(make_llm(), tmp_path)
    with pytest.raises(AdapterLoadError, match="another configuration, another base model .* or damaged"):
        model.load_adapter(tmp_path, "second", ignore_mismatched_sizes=True)


def test_a_base_of_another_width_is_an_error(make_model: Callable, make_llm: Callable, tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path)
    with pytest.raises(AdapterLoadError, match=r"bituning_suffix.default.weight: file \[1, 32\], model \[1, 48\]"):
        PeftModel.from_pretrained(make_llm(hidden_size=48), tmp_path)


def test_a_truncated_file_is_refused_by_the_reader(make_model: Callable, make_llm: Callable, tmp_path: Path) -> None:
    """PEFT reads the file before any of our code runs: safetensors' own error comes through."""
    make_model().save_pretrained(tmp_path)
    whole = (tmp_path / TENSORS).read_bytes()
    for size in (len(whole) - 1, len(whole) // 2, 100, 4):
        (tmp_path / TENSORS).write_bytes(whole[:size])
        with pytest.raises(SafetensorError, match="Error while deserializing header"):
            PeftModel.from_pretrained(make_llm(), tmp_path)


# ---------------------------------------------------------------------- several adapters


def test_load_switch_and_delete(
    make_model: Callable, make_llm: Callable, make_inputs: Callable, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    inputs = make_inputs()
    expected = {}
    for seed, name in enumerate(("a", "ab")):  # one name within the other
        model = make_model(adapter_name=name)
        for _ in range(seed + 1):
            stir(model, name)
        expected[name] = embed(model, inputs)
        model.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(make_llm(), tmp_path / "a", adapter_name="a")
    model.load_adapter(tmp_path / "ab", "ab")
    assert torch.equal(embed(model, inputs), expected["a"])
    model.set_adapter("ab")
    assert torch.equal(embed(model, inputs), expected["ab"])
    model.save_pretrained(tmp_path / "again")
    for name in ("a", "ab"):
        again = PeftModel.from_pretrained(make_llm(), tmp_path / "again" / name)
        assert torch.equal(embed(again, inputs), expected[name])
    model.set_adapter("a")
    assert torch.equal(embed(model, inputs), expected["a"])
    model.delete_adapter("ab")
    assert list(model.peft_config) == ["a"]
    assert not any(".ab." in name for name in model.state_dict())
    assert torch.equal(embed(model, inputs), expected["a"])
    model.load_adapter(tmp_path / "ab", "ab")
    with pytest.warns(UserWarning, match="Setting active adapter to"):
        model.delete_adapter("a")
    assert model.active_adapters == ["ab"]
    assert torch.equal(embed(model, inputs), expected["ab"])


def test_adding_one_leaves_the_active_one_as_it_is(
    make_model: Callable, make_inputs: Callable, make_config: Callable
) -> None:
    model, inputs = make_model(), make_inputs()
    expected = embed(model, inputs)
    before = {name: each.requires_grad for name, each in model.named_parameters()}
    model.add_adapter("second", make_config(prefix_encoder="static"))
    after = {name: each.requires_grad for name, each in model.named_parameters()}
    assert {name: after[name] for name in before} == before
    assert not any(after[name] for name in set(after) - set(before))  # the new one waits
    assert torch.equal(embed(model, inputs), expected)
    model.set_adapter("second")
    trained = {name for name, each in model.named_parameters() if each.requires_grad}
    assert trained == set(after) - set(before)
    assert embed(model, {key: inputs[key] for key in ("input_ids", "attention_mask")}).shape == (3, 32)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_without_drawing_weights_at_the_models_scale(
    make_model: Callable, make_llm: Callable, make_inputs: Callable, tmp_path: Path, encoder: str
) -> None:
    """`init_weights=False` draws with a standard deviation of 0.02, and is kept in the file."""
    model, inputs = make_model(init_weights=False, prefix_encoder=encoder), make_inputs()
    suffix = model.get_base_model().virtual_tokens.bituning_suffix["default"].weight
    assert 0.01 < float(suffix.detach().std()) < 0.03
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_llm(), tmp_path)
    assert loaded.peft_config["default"].init_weights is False
    assert torch.equal(embed(loaded, inputs), embed(model, inputs))


def test_selected_adapters_are_saved(make_model: Callable, make_config: Callable, tmp_path: Path) -> None:
    model = make_model()
    model.add_adapter("items", make_config())
    model.save_pretrained(tmp_path, selected_adapters=["items"])
    assert (tmp_path / "items" / TENSORS).is_file() and not (tmp_path / TENSORS).exists()


# ---------------------------------------------------------------------- off, out, copied


def test_disabled_it_is_the_base_model(
    make_model: Callable, make_llm: Callable, make_inputs: Callable, task: str
) -> None:
    inputs = make_inputs()
    text = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    model, llm = make_model(), make_llm()
    with model.disable_adapter():
        found = model(**inputs)
        assert type(found) is type(llm(**text))
        assert torch.equal(found.logits, llm(**text).logits)
        labelled = model(**text, labels=text["input_ids"]) if task == "CAUSAL_LM" else None
    if labelled is not None:
        assert torch.equal(labelled.loss, llm(**text, labels=text["input_ids"]).loss)
    assert model(**inputs).pooler_output.shape == (3, 32)


def test_unload_gives_the_base_back(make_model: Callable, make_llm: Callable, make_inputs: Callable) -> None:
    llm = make_llm()
    names = set(llm.state_dict())
    model = make_model(llm)
    back = model.unload()
    assert back is llm
    assert set(back.state_dict()) == names
    assert not any(isinstance(module, VirtualTokens) for module in back.modules())
    ids = make_inputs()["input_ids"]
    assert torch.equal(back(ids).logits, make_llm()(ids).logits)
    assert embed(make_model(back), make_inputs()).shape == (3, 32)  # and it can be tuned again


@pytest.mark.parametrize(
    "operation",
    [
        lambda model: model.merge_and_unload(),
        lambda model: model.merge_adapter(),
        lambda model: model.base_model._layer.merge(),
    ],
)
def test_merging_is_refused(make_model: Callable, operation: Callable) -> None:
    with pytest.raises(UnsupportedOperationError, match="virtual tokens cannot be merged into the base model"):
        operation(make_model())


def test_weighted_adapters_are_refused(make_model: Callable, make_config: Callable) -> None:
    model = make_model()
    model.add_adapter("second", make_config())
    with pytest.raises(UnsupportedOperationError, match="cannot be combined into a weighted one"):
        model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "both")


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_independent(make_model: Callable, make_inputs: Callable, copier: Callable) -> None:
    model, inputs = make_model(), make_inputs()
    expected = embed(model, inputs)
    twin = copier(model)
    assert torch.equal(embed(twin, inputs), expected)
    assert twin.base_model._layer._embeddings[0] is twin.get_input_embeddings()
    stir(twin)
    assert not torch.equal(embed(twin, inputs), expected)
    assert torch.equal(embed(model, inputs), expected)


def test_modules_to_save(
    make_model: Callable, make_llm: Callable, make_inputs: Callable, tmp_path: Path, task: str
) -> None:
    module = "lm_head" if task == "CAUSAL_LM" else "norm"
    model, inputs = make_model(modules_to_save=[module]), make_inputs()
    trained = {name for name, each in model.named_parameters() if each.requires_grad and "bituning_" not in name}
    assert trained and all(f"{module}.modules_to_save.default" in name for name in trained)
    labels = {"labels": inputs["input_ids"]} if task == "CAUSAL_LM" else {}
    before = model(**inputs, **labels)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in trained:
                parameter.mul_(torch.linspace(0.5, 2, len(parameter)).view(-1, *[1] * (parameter.ndim - 1)))
    expected = model(**inputs, **labels)
    field = "logits" if task == "CAUSAL_LM" else "pooler_output"
    assert not torch.allclose(expected[field], before[field])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_llm(), tmp_path).eval()
    assert torch.equal(loaded(**inputs, **labels)[field], expected[field])
    with loaded.disable_adapter():
        ids = inputs["input_ids"]
        assert torch.equal(loaded(ids).logits, make_llm()(ids).logits)


def test_moving_moves_the_adapter(make_model: Callable, make_inputs: Callable) -> None:
    model = make_model().to(torch.float64)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    assert model(**make_inputs()).pooler_output.dtype == torch.float64


@pytest.mark.parametrize("offloaded", ["model.layers.1", "model.embed_tokens"])
def test_weights_offloaded_to_disk(
    make_model: Callable, make_llm: Callable, make_inputs: Callable, tmp_path: Path, offloaded: str
) -> None:
    """accelerate keeps them on the meta device and brings them in for each forward pass."""
    make_llm().save_pretrained(tmp_path / "llm")
    places = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "llm",
        device_map={place: "disk" if place == offloaded else "cpu" for place in places},
        offload_folder=tmp_path / "offload",
    )
    assert {each.device.type for each in base.get_submodule(offloaded).parameters()} == {"meta"}
    words = {"prefix_token_ids": [4, 5], "suffix_token_id": 7}
    model, plain, inputs = make_model(base, **words), make_model(**words), make_inputs()
    trained = [each for each in model.parameters() if each.requires_grad]
    for found, expected in zip(trained, [each for each in plain.parameters() if each.requires_grad], strict=True):
        assert torch.equal(found, expected)
    assert torch.equal(embed(model, inputs), embed(plain, inputs))
    model(**inputs).pooler_output.sum().backward()
    assert all(each.grad is not None for each in trained)


def test_transformers_own_load_adapter_refuses(make_model: Callable, make_llm: Callable, tmp_path: Path) -> None:
    """It would inject virtual tokens and never run them."""
    make_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="(?i)peft"):
        make_llm().load_adapter(str(tmp_path))


# ---------------------------------------------------------------------- own encoders


@register_prefix_encoder("test_last_item")
class LastItemEncoder(PrefixEncoder):
    """Project each row's last real item; rows without one get the bias."""

    needs_collaborative = True

    def __init__(self, config: BiTuningConfig, token_dim: int, scale: float) -> None:
        super().__init__(config, token_dim, scale)
        self.dense = nn.Linear(config.collaborative_dim or 1, config.num_virtual_tokens * token_dim)

    def forward(self, batch_size: int, collaborative_embeds: Any, collaborative_mask: Any) -> Prefix:
        last = collaborative_mask.long().cumsum(1).argmax(1)
        items = collaborative_embeds[torch.arange(batch_size), last]
        return Prefix(self.dense(items).view(batch_size, self.num_tokens, self.token_dim))


def test_an_own_encoder_trains_and_reloads(
    make_model: Callable, make_llm: Callable, make_inputs: Callable, tmp_path: Path
) -> None:
    model, inputs = make_model(prefix_encoder="test_last_item"), make_inputs()
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.05)
    goal = torch.randn(3, 32, generator=torch.Generator().manual_seed(3))
    losses = []
    for _ in range(10):
        loss = nn.functional.mse_loss(model(**inputs).pooler_output, goal)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    expected = embed(model, inputs)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["prefix_encoder"] == "test_last_item"
    assert torch.equal(embed(PeftModel.from_pretrained(make_llm(), tmp_path), inputs), expected)
    shutil.copytree(tmp_path, tmp_path / "elsewhere")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "elsewhere" / "adapter_config.json").write_text(json.dumps(config | {"prefix_encoder": "not_here"}))
    with pytest.raises(ConfigurationError, match="got 'not_here'; import the module that registers it before loading"):
        PeftModel.from_pretrained(make_llm(), tmp_path / "elsewhere")
