"""Every step of an adapter's life that PEFT offers, as PEFT's own methods go through it."""

import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForFeatureExtraction,
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftType,
)
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from safetensors.torch import load_file, save_file

from peft_bituning import ILoRAConfig, ILoRAModel
from peft_bituning.errors import UnsupportedOperationError
from peft_bituning.tuners.ilora.layer import InstanceGates

from .conftest import FAMILIES, embed, stir

TENSORS = "adapter_model.safetensors"
GATE = "base_model.model.instance_gates.ilora_gate"


# ---------------------------------------------------------------------- making one


def test_it_is_registered() -> None:
    member = PeftType("ILORA")
    assert PEFT_TYPE_TO_CONFIG_MAPPING[member] is ILoRAConfig and PEFT_TYPE_TO_TUNER_MAPPING[member] is ILoRAModel


@pytest.mark.parametrize("task", ["FEATURE_EXTRACTION", "CAUSAL_LM"])
def test_get_peft_model(
    make_model: Callable, make_llm: Callable, capsys: pytest.CaptureFixture[str], task: str
) -> None:
    model = make_model(task_type=task, pooling="suffix")
    assert type(model) is {"FEATURE_EXTRACTION": PeftModelForFeatureExtraction, "CAUSAL_LM": PeftModelForCausalLM}[task]
    assert isinstance(model.base_model, ILoRAModel)
    linears = [each for name, each in make_llm().named_modules() if name.endswith("_proj")]
    assert len(linears) == 14  # the 7 projections of 2 layers
    experts = sum(8 * (each.in_features + each.out_features) for each in linears)
    model.print_trainable_parameters()
    assert f"trainable params: {experts + 4 * 6 + 6 + 32:,} ||" in capsys.readouterr().out  # W_g, null, suffix
    status = model.get_model_status()
    assert (status.peft_types, status.enabled, status.num_adapter_layers) == ({"default": "ILORA"}, True, 15)
    assert (status.active_adapters, status.merged_adapters) == (["default"], [])
    assert {layer.name for layer in model.get_layer_status()} >= {"model.instance_gates"}
    base = dict(make_llm().named_parameters())
    for name, parameter in model.get_base_model().named_parameters():
        if name.replace(".base_layer", "") in base:
            assert torch.equal(parameter, base[name.replace(".base_layer", "")]) and not parameter.requires_grad


def test_a_fresh_adapter_changes_nothing(make_llm: Callable, make_config: Callable, make_inputs: Callable) -> None:
    from peft import get_peft_model

    inputs = make_inputs()
    model = get_peft_model(make_llm(), make_config()).eval()
    states = make_llm().model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
    torch.testing.assert_close(model(**inputs).pooler_output, states[torch.arange(3), [6, 3, 0]])


# ---------------------------------------------------------------------- files


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("low", [False, True])
def test_a_fresh_base_gives_the_same_bits(
    make_model: Callable, make_llm: Callable, make_inputs: Callable, tmp_path: Path, family: str, low: bool
) -> None:
    model, inputs = make_model(family, pooling="suffix"), make_inputs()
    expected = embed(model, inputs)
    model.save_pretrained(tmp_path)
    torch.manual_seed(99)
    loaded = PeftModel.from_pretrained(make_llm(family), tmp_path, low_cpu_mem_usage=low)
    assert not any(each.is_meta or each.requires_grad for each in loaded.parameters())
    assert torch.equal(embed(loaded, inputs), expected)
    renamed = PeftModel.from_pretrained(make_llm(family), tmp_path, adapter_name="another", is_trainable=True)
    assert torch.equal(embed(renamed, inputs), expected)
    assert {name for name, each in renamed.named_parameters() if each.requires_grad} == {
        name.replace(".default.", ".another.") for name, each in model.named_parameters() if each.requires_grad
    }
    loaded.load_adapter(tmp_path, "second", low_cpu_mem_usage=low)
    loaded.set_adapter("second")
    assert torch.equal(embed(loaded, inputs), expected)


def test_another_process(make_model: Callable, make_llm: Callable, make_inputs: Callable, tmp_path: Path) -> None:
    llm, inputs = make_llm(), make_inputs()
    llm.save_pretrained(tmp_path / "llm")
    llm.name_or_path = "llm"
    model = make_model(llm, pooling="suffix")
    model.save_pretrained(tmp_path / "adapter")
    save_file(inputs, tmp_path / "inputs")
    code = (
        "import peft_bituning, torch; from peft import AutoPeftModelForFeatureExtraction as Auto;"
        "from safetensors.torch import load_file, save_file; torch.set_num_threads(1);"
        "out = Auto.from_pretrained('adapter').eval()(**load_file('inputs'));"
        "save_file({'out': out.pooler_output.detach()}, 'out')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert torch.equal(load_file(tmp_path / "out")["out"], embed(model, inputs))


@pytest.mark.parametrize("task", ["FEATURE_EXTRACTION", "CAUSAL_LM"])
def test_auto_classes(
    make_model: Callable, make_llm: Callable, make_inputs: Callable, tmp_path: Path, task: str
) -> None:
    auto = {"FEATURE_EXTRACTION": AutoPeftModelForFeatureExtraction, "CAUSAL_LM": AutoPeftModelForCausalLM}[task]
    llm, inputs = make_llm(), make_inputs()
    llm.save_pretrained(tmp_path / "base")
    llm.name_or_path = str(tmp_path / "base")
    model = make_model(llm, task_type=task)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(embed(auto.from_pretrained(tmp_path / "adapter"), inputs), embed(model, inputs))


def test_the_files_hold_the_adapter_alone(make_model: Callable, tmp_path: Path) -> None:
    model = make_model(pooling="suffix")
    model.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {TENSORS, "adapter_config.json", "README.md"}
    tensors = load_file(tmp_path / TENSORS)
    trained = {name for name, each in model.named_parameters() if each.requires_grad}
    assert {name.replace(".default", "") for name in trained} == set(tensors)
    assert tensors[f"{GATE}.weight"].shape == (4, 6) and tensors[f"{GATE}.null"].shape == (6,)
    assert tensors["base_model.model.instance_gates.ilora_suffix.weight"].shape == (1, 32)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["num_experts"], config["collaborative_dim"]) == ("ILORA", 4, 6)


def test_modules_to_save(make_model: Callable, make_llm: Callable, make_inputs: Callable, tmp_path: Path) -> None:
    model, inputs = make_model(modules_to_save=["norm"]), make_inputs()
    before = embed(model, inputs)
    with torch.no_grad():
        model.get_base_model().model.norm.modules_to_save["default"].weight.mul_(torch.linspace(0.5, 2, 32))
    expected = embed(model, inputs)
    assert not torch.allclose(expected, before)
    model.save_pretrained(tmp_path)
    assert torch.equal(embed(PeftModel.from_pretrained(make_llm(), tmp_path), inputs), expected)


def test_modules_to_save_that_end_like_the_gate(
    make_model: Callable, make_config: Callable, make_inputs: Callable
) -> None:
    """The routers of a mixture of experts."""
    model, inputs = make_model("Mixtral"), make_inputs()
    expected = embed(model, inputs)
    model.add_adapter("second", make_config(modules_to_save=["gate"]))
    saved = {name.split(".modules_to_save")[0] for name, _ in model.named_parameters() if "modules_to_save" in name}
    assert saved == {f"base_model.model.model.layers.{layer}.mlp.gate" for layer in (0, 1)}
    assert torch.equal(embed(model, inputs), expected)


# ---------------------------------------------------------------------- several adapters


def test_load_switch_and_delete(
    make_model: Callable, make_llm: Callable, make_inputs: Callable, tmp_path: Path
) -> None:
    inputs, expected = make_inputs(), {}
    kinds = {"a": {"num_experts": 4}, "ab": {"num_experts": 2, "target_modules": ["q_proj", "up_proj"]}}
    for name, changes in kinds.items():  # one name within the other
        model = make_model(adapter_name=name, pooling="suffix", **changes)
        expected[name] = embed(model, inputs)
        model.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(make_llm(), tmp_path / "a", adapter_name="a")
    model.load_adapter(tmp_path / "ab", "ab")
    assert torch.equal(embed(model, inputs), expected["a"])
    model.set_adapter("ab")
    assert torch.equal(embed(model, inputs), expected["ab"])
    model.save_pretrained(tmp_path / "again")
    for name in kinds:
        assert torch.equal(
            embed(PeftModel.from_pretrained(make_llm(), tmp_path / "again" / name), inputs), expected[name]
        )
    model.set_adapter("a")
    assert torch.equal(embed(model, inputs), expected["a"])
    model.delete_adapter("ab")
    assert list(model.peft_config) == ["a"] and not any(".ab." in name for name in model.state_dict())
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
    model.add_adapter("second", make_config(pooling="suffix"))
    after = {name: each.requires_grad for name, each in model.named_parameters()}
    assert {name: after[name] for name in before} == before
    assert not any(after[name] for name in set(after) - set(before))  # the new one waits
    assert torch.equal(embed(model, inputs), expected)
    model.set_adapter("second")
    assert {name for name, each in model.named_parameters() if each.requires_grad} == set(after) - set(before)
    assert (
        model.peft_config["second"].target_modules == model.peft_config["default"].target_modules
    )  # none of the gate's


def test_weighted_adapters_are_refused(make_model: Callable, make_config: Callable) -> None:
    model = make_model()
    model.add_adapter("second", make_config())
    with pytest.raises(
        UnsupportedOperationError, match="cannot be combined into a weighted one: each adapter's experts"
    ):
        model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "both")


# ---------------------------------------------------------------------- off, out, copied


def test_disabled_it_is_the_base_model(make_model: Callable, make_llm: Callable, make_inputs: Callable) -> None:
    inputs = make_inputs()
    text = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    model, llm = make_model(task_type="CAUSAL_LM"), make_llm()
    with model.disable_adapter():
        found = model(**inputs, labels=text["input_ids"])
        assert type(found) is type(llm(**text))
        assert torch.equal(found.logits, llm(**text).logits)
        assert torch.equal(found.loss, llm(**text, labels=text["input_ids"]).loss)
    assert model(**inputs).pooler_output.shape == (3, 32)


def test_unload_gives_the_base_back(make_model: Callable, make_llm: Callable, make_inputs: Callable) -> None:
    llm = make_llm()
    names = set(llm.state_dict())
    back = make_model(llm).unload()
    assert back is llm and set(back.state_dict()) == names
    assert not any(isinstance(module, InstanceGates) for module in back.modules())
    ids = make_inputs()["input_ids"]
    assert torch.equal(back(ids).logits, make_llm()(ids).logits)
    assert embed(make_model(back), make_inputs()).shape == (3, 32)  # and it can be tuned again


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_independent(make_model: Callable, make_inputs: Callable, copier: Callable) -> None:
    model, inputs = make_model(pooling="suffix"), make_inputs()
    expected = embed(model, inputs)
    twin = copier(model)
    assert torch.equal(embed(twin, inputs), expected)
    assert twin.base_model._layer.row_gates is not model.base_model._layer.row_gates
    stir(twin, seed=6)
    assert not torch.equal(embed(twin, inputs), expected)
    assert torch.equal(embed(model, inputs), expected)


def test_moving_moves_the_adapter(make_model: Callable, make_inputs: Callable) -> None:
    model = make_model(pooling="suffix").to(torch.float64)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    assert model(**make_inputs()).pooler_output.dtype == torch.float64


def test_transformers_own_load_adapter_refuses(make_model: Callable, make_llm: Callable, tmp_path: Path) -> None:
    """It would inject experts and never tell them their gates."""
    make_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="(?i)peft"):
        make_llm().load_adapter(str(tmp_path))


def test_a_failed_start_can_be_repeated(make_llm: Callable, make_config: Callable, make_inputs: Callable) -> None:
    from peft import get_peft_model

    llm = make_llm()
    with pytest.raises(ValueError, match="nowhere"):
        get_peft_model(llm, make_config(target_modules=["nowhere"]))
    assert not any(isinstance(each, InstanceGates) for each in llm.modules())
    assert embed(get_peft_model(llm, make_config()), make_inputs()).shape == (3, 32)
