"""The one pass of the language model: the right states, resumed after a kill, refused for anything else."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from peft_bituning.data import PRESETS, ItemCatalog, PromptEncoder
from peft_bituning.errors import ArtifactError, ConfigurationError, InputError
from peft_bituning.ssna import ITEM_TEXT, ItemStates, cache_item_states

pytestmark = pytest.mark.timeout(900)  # processes of their own


def test_states_are_the_models_own(tiny_base, tiny_data, tmp_path):
    """Every item alone through the whole model, without padding, gives the same pooled states."""
    base = tiny_base()
    prompts = PromptEncoder(ITEM_TEXT, base.tokenizer, tiny_data.items)
    cached = {
        pooling: cache_item_states(
            base, tiny_data.items, tmp_path / pooling, num_layers=2, pooling=pooling, batch_size=5, block_size=7
        )
        for pooling in ("last", "mean")
    }
    assert cached["last"].values.shape == (12, 2, 32)
    for item in range(12):
        tokens = torch.tensor([prompts.encode([item], "item")])
        with torch.no_grad():
            layers = base.model(tokens, output_hidden_states=True).hidden_states
        for pooling, states in cached.items():
            for layer in range(2):
                own = layers[1 + layer][0]
                expected = own[-1] if pooling == "last" else own.mean(0)
                assert torch.allclose(states.values[item, layer], expected, atol=1e-5)


def test_the_text_is_title_and_attributes_alone(tiny_base, tiny_data):
    prompts = PromptEncoder(ITEM_TEXT, tiny_base().tokenizer, tiny_data.items)
    assert prompts.text([1], "item") == " Steel kettle (brand: Bolt, category: kitchen)"


def test_the_top_layers_are_kept_and_all_where_there_are_fewer(tiny_base, tiny_data, tmp_path):
    top = cache_item_states(tiny_base(), tiny_data.items, tmp_path / "1", num_layers=1)
    both = cache_item_states(tiny_base(), tiny_data.items, tmp_path / "99", num_layers=99)
    assert top.num_layers == 1 and both.num_layers == 2
    assert torch.equal(top.values[:, 0], both.values[:, 1])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_the_rounded_state(dtype, tiny_base, tiny_data, tmp_path):
    full = cache_item_states(tiny_base(), tiny_data.items, tmp_path / "full", num_layers=2)
    half = cache_item_states(tiny_base(), tiny_data.items, tmp_path / "half", num_layers=2, dtype=dtype)
    assert torch.equal(half.values, full.values.to(getattr(torch, dtype)))


def test_a_kill_at_any_moment_loses_one_block(tiny_base_folder, tmp_path):
    command = [sys.executable, str(Path(__file__).with_name("killed_caching.py")), str(tiny_base_folder), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    outcomes = json.loads(done.stdout.splitlines()[-1])
    reference = outcomes.pop("uninterrupted")
    assert reference["items"] == 11 and len(outcomes) == 7
    for name, outcome in outcomes.items():
        assert outcome["killed"], name
        assert outcome["items"] == outcome["left"], name
        assert outcome["sha256"] == reference["sha256"], name


def test_a_finished_cache_is_opened_and_the_model_not_run(tiny_base, tiny_data, tmp_path):
    first = cache_item_states(tiny_base(), tiny_data.items, tmp_path)
    base = tiny_base()
    base.model.register_forward_pre_hook(lambda *_: pytest.fail("the model was run"))
    base.model.model.register_forward_pre_hook(lambda *_: pytest.fail("the model was run"))
    again = cache_item_states(base, tiny_data.items, tmp_path)
    assert torch.equal(again.values, first.values) and again.origin == first.origin


def test_a_damaged_block_alone_is_made_again(tiny_base, tiny_data, tmp_path):
    expected = cache_item_states(tiny_base(), tiny_data.items, tmp_path, block_size=4).values.clone()
    place = tmp_path / "states.safetensors"
    data = bytearray(place.read_bytes())
    data[-3] ^= 64
    place.write_bytes(data)
    base, rows = tiny_base(), []
    base.model.model.register_forward_hook(lambda *arguments: rows.append(len(arguments[2].last_hidden_state)))
    assert torch.equal(cache_item_states(base, tiny_data.items, tmp_path).values, expected)
    assert sum(rows) == 4 and torch.equal(ItemStates.open(tmp_path).values, expected)


def changed_weights(base):
    with torch.no_grad():
        base.model.model.layers[1].mlp.up_proj.weight[0, 0] += 1.0
    return base


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda base, items: (base, items, {"pooling": "mean"}), "pooling was 'last' and is 'mean'"),
        (lambda base, items: (base, items, {"num_layers": 1}), r"shape was \[12, 2, 32\] and is \[12, 1, 32\]"),
        (lambda base, items: (base, items, {"dtype": "bfloat16"}), "dtype was 'float32' and is 'bfloat16'"),
        (lambda base, items: (base, items, {"template": PRESETS["paper"]}), "template.instruction was ''"),
        (lambda base, items: (changed_weights(base), items, {}), "weights was"),
        (lambda base, items: (dataclasses.replace(base, name="other"), items, {}), "base_model was 'tiny-llama' and"),
        (lambda base, items: (base, items.extended([{"item_id": "z", "title": "Tin"}]), {}), r"items was .*shape was"),
        (
            lambda base, items: (base, ItemCatalog(items.item_ids, items.attributes[1:] + items.attributes[:1]), {}),
            "items was",
        ),
    ],
)
def test_another_origin_is_refused_and_replaced_where_asked(change, message, tiny_base, tiny_data, tmp_path):
    cache_item_states(tiny_base(), tiny_data.items, tmp_path)
    before = (tmp_path / "states.safetensors").read_bytes()
    base, items, settings = change(tiny_base(), tiny_data.items)
    with pytest.raises(ArtifactError, match=rf"of another origin: .*{message}.*overwrite=True"):
        cache_item_states(base, items, tmp_path, **settings)
    assert (tmp_path / "states.safetensors").read_bytes() == before
    states = cache_item_states(base, items, tmp_path, overwrite=True, **settings)
    assert len(states) == len(items)
    assert ItemStates.open(tmp_path).origin == states.origin


def test_a_truncated_cache_is_refused_and_replaced_where_asked(tiny_base, tiny_data, tmp_path):
    expected = cache_item_states(tiny_base(), tiny_data.items, tmp_path).values.clone()
    place = tmp_path / "states.safetensors"
    place.write_bytes(place.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match="truncated or belongs to another run"):
        cache_item_states(tiny_base(), tiny_data.items, tmp_path)
    assert torch.equal(cache_item_states(tiny_base(), tiny_data.items, tmp_path, overwrite=True).values, expected)


def test_an_item_without_text_has_states_of_zero(tiny_base, tmp_path):
    items = ItemCatalog.from_records([{"item_id": "a", "title": "Tin"}, {"item_id": "b"}])
    for pooling in ("last", "mean"):
        values = cache_item_states(tiny_base(), items, tmp_path / pooling, pooling=pooling).values
        assert values[0].abs().sum() > 0 and not values[1].any()


def test_items_of_one_text_and_items_that_were_cut_are_reported(tiny_base, tmp_path, caplog):
    base = tiny_base()
    base.model.config.max_position_embeddings = 6
    titles = ["Tin", "Tin", "Tin cup", " ".join(["cup"] * 30)]
    items = ItemCatalog.from_records({"item_id": str(row), "title": title} for row, title in enumerate(titles))
    cache_item_states(base, items, tmp_path)
    assert "some items were cut to the model's context of 6 tokens" in caplog.text
    assert "2 items share their text with another one" in caplog.text


def test_the_model_is_left_as_it_was(tiny_base, tiny_data, tmp_path):
    base = tiny_base()
    base.model.train().requires_grad_(True)
    before = {name: weight.clone() for name, weight in base.model.named_parameters()}
    states = cache_item_states(base, tiny_data.items, tmp_path)
    assert base.model.training and not states.values.requires_grad
    for name, weight in base.model.named_parameters():
        assert weight.grad is None and torch.equal(weight, before[name])


def test_states_that_are_not_finite_name_their_items(tiny_base, tiny_data, tmp_path):
    base = tiny_base()
    with torch.no_grad():
        base.model.model.norm.weight.fill_(1e30)
    with pytest.raises(InputError, match=r"finite in float16, got NaN or infinity for 12 items, first \['007', '8'"):
        cache_item_states(base, tiny_data.items, tmp_path, dtype="float16")


def test_settings_are_checked(tiny_base, tiny_data, tmp_path):
    for name in ("num_layers", "batch_size", "block_size"):
        with pytest.raises(ConfigurationError, match=f"{name} must be at least 1, got 0"):
            cache_item_states(tiny_base(), tiny_data.items, tmp_path, **{name: 0})
    with pytest.raises(ConfigurationError, match="pooling must be one of last, mean, got 'max'"):
        cache_item_states(tiny_base(), tiny_data.items, tmp_path, pooling="max")
