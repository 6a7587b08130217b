"""The assembly: one call for whoever has a loop of their own."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from peft_bituning import BiTuningConfig, ILoRAConfig
from peft_bituning.assembly import assemble, attach_adapter, read_template
from peft_bituning.base_models import BaseModel
from peft_bituning.catalog.encoder import HistorySettings
from peft_bituning.data import Interactions, PromptTemplate
from peft_bituning.errors import ConfigurationError
from peft_bituning.losses import catalog_contrastive_loss
from peft_bituning.recommenders import Precomputed

Base = Callable[[], BaseModel]
KNOWN = Precomputed(torch.randn(10, 8, generator=torch.Generator().manual_seed(0)), max_length=7)


def test_a_loop_of_ones_own(tiny_base_folder: Path, few: Interactions) -> None:
    encoder = assemble(tiny_base_folder, BiTuningConfig(prefix_encoder="static"), few.items, template="no_instruction")
    optimizer = torch.optim.AdamW((each for each in encoder.model.parameters() if each.requires_grad), lr=1e-2)
    table = torch.nn.functional.normalize(encoder.encode_items(len(few.items)))
    losses = []
    for _ in range(8):
        output, _ = encoder.forward([[0, 1], [4, 5]])
        loss = catalog_contrastive_loss(output["pooler_output"], table, torch.tensor([2, 6]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0]


def test_parts_fit(tiny_base: Base, few: Interactions) -> None:
    encoder = assemble(
        tiny_base(), BiTuningConfig(), few.items, KNOWN, "released", HistorySettings(max_history=3), batch_size=5
    )
    assert encoder.collator.prompts.max_items == 3 and encoder.collator.prompts.template.name == "released"
    assert encoder.collator.max_items == 7 and encoder.batch_size == 5 and encoder.id_recommender is KNOWN
    assert encoder.model.num_virtual_tokens == 8 and encoder.model.needs_collaborative
    # P + T + 1 fit the 512 positions of the language model
    assert encoder.collator.prompts.max_length == 512 - 8 - 1
    assert encoder.encode([[0, 1, 2]]).shape == (1, 32)


def test_a_model_that_is_there(tiny_base: Base, few: Interactions) -> None:
    base = tiny_base()
    model = attach_adapter(base, ILoRAConfig(r=4), KNOWN)
    encoder = assemble(base, model, few.items, KNOWN)
    assert encoder.model is model and model.num_virtual_tokens == 0 and model.needs_collaborative
    assert encoder.encode([[0], [1, 2]]).shape == (2, 32)


def test_what_reads_no_recommender_gets_none(tiny_base: Base, few: Interactions) -> None:
    encoder = assemble(tiny_base(), BiTuningConfig(prefix_encoder="static"), few.items, KNOWN)
    assert encoder.id_recommender is None and encoder.collator.max_items == 7


def test_the_same_seed_gives_the_same_weights(tiny_base: Base) -> None:
    one, same, other = (attach_adapter(tiny_base(), BiTuningConfig(), KNOWN, seed).weights_out() for seed in (3, 3, 4))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_weights_in_and_out(tiny_base: Base) -> None:
    """By the names of PEFT's files, whatever kind of adapter it is."""
    for config in (BiTuningConfig(center_embeddings=True), ILoRAConfig(r=4)):
        one, other = (attach_adapter(tiny_base(), config, KNOWN, seed) for seed in (0, 1))
        weights = one.weights_out()
        assert all(name.startswith("base_model.model.") for name in weights)
        other.weights_in(weights)
        assert all(torch.equal(value, weights[name]) for name, value in other.weights_out().items())


def test_an_encoder_around_another_model_and_over_another_catalog(tiny_base: Base, few: Interactions) -> None:
    encoder = assemble(tiny_base(), BiTuningConfig(prefix_encoder="none"), few.items)
    other = attach_adapter(tiny_base(), BiTuningConfig(prefix_encoder="none"), seed=1)
    assert encoder.around(other).model is other and encoder.model is not other
    extended = encoder.over(few.items.extended([{"item_id": "new", "title": "a lamp"}]))
    assert extended.encode([[10]]).shape == (1, 32) and len(encoder.collator.prompts.items) == 10
    torch.testing.assert_close(extended.encode([[3]]), encoder.encode([[3]]))


@pytest.mark.parametrize("taken", ["BiTuning", "LoRA"])
def test_a_second_adapter_is_refused(tiny_base: Base, taken: str) -> None:
    base = tiny_base()
    if taken == "LoRA":
        get_peft_model(base.model, LoraConfig(target_modules="all-linear"))
    else:
        attach_adapter(base, BiTuningConfig(prefix_encoder="static"))
    with pytest.raises(ConfigurationError, match="base_model must be without an adapter, got 'tiny-llama', which alr"):
        attach_adapter(base, BiTuningConfig(prefix_encoder="static"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BiTuningConfig(collaborative_dim=5), "collaborative_dim must be the recommender's width 8, got 5"),
        (BiTuningConfig(prefix_encoder="none", pooling="mean"), "the adapter must have something to train"),
    ],
)
def test_what_does_not_fit_is_refused(tiny_base: Base, config: BiTuningConfig, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        attach_adapter(tiny_base(), config, KNOWN)


def test_a_reader_without_a_recommender_is_refused(tiny_base: Base) -> None:
    with pytest.raises(ConfigurationError, match="id_recommender must not be 'none' for prefix_encoder='mformer'"):
        attach_adapter(tiny_base(), BiTuningConfig(collaborative_dim=8))


def test_no_room_for_text(tiny_base: Base, few: Interactions) -> None:
    config = BiTuningConfig(prefix_encoder="static", num_virtual_tokens=511)
    with pytest.raises(ConfigurationError, match=r"leave room for text in max_position_embeddings \(512\), got 511"):
        assemble(tiny_base(), config, few.items)


def test_templates(few: Interactions, trained, tmp_path: Path) -> None:
    own = PromptTemplate("own", "Items:", fields=("brand",))
    (tmp_path / "own.json").write_text(own.to_json())
    assert read_template(str(tmp_path / "own.json")) == own
    assert read_template("paper", ["none"]).fields == () and read_template("paper", ["template"]).fields is None
    assert read_template("paper", ["brand"], trained.data.items).fields == ("brand",)
    with pytest.raises(ConfigurationError, match=r"columns of the catalog \(it has none\) or none, got brand"):
        read_template("paper", ["brand"], few.items)
    with pytest.raises(ConfigurationError, match="template must be one of paper, .*, or a JSON file, got 'poem'"):
        read_template("poem")
