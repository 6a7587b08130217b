"""The recommender over cached states: what is trained, what is kept, what is refused."""

import subprocess
import sys

import pytest
import torch
from torch.nn import functional

from peft_bituning.errors import ArtifactError, ConfigurationError, InputError
from peft_bituning.evaluation import evaluate_ranking, history_scorer
from peft_bituning.recommenders import fit_recommender, load_recommender, pad_histories
from peft_bituning.ssna import SSNA, ItemStates, SSNAConfig

NUM_ITEMS = 9
ORIGIN = {"base_model": "org/tiny", "fingerprint": {"hidden_size": 12}, "template": {"marker": ""}, "pooling": "last"}
STATES = ItemStates(torch.randn(NUM_ITEMS, 3, 12, generator=torch.Generator().manual_seed(0)), ORIGIN)
HISTORIES = [[1, 2, 3], [4], [5, 6, 7, 8], []]
SEQUENCES = [[(start + step) % NUM_ITEMS for step in range(5)] for start in range(NUM_ITEMS)]
IN_A_NEW_PROCESS = """
import sys, torch
import peft_bituning.ssna
from peft_bituning.recommenders import load_recommender, pad_histories
model = load_recommender(sys.argv[1])
batch = pad_histories({histories})
torch.save([model.encode(*batch), model.scores(*batch)], sys.argv[1] + "/out")
print(model.content_hash())
"""


def config(**settings):
    sizes = {"num_layers": 3, "adapter_size": 4, "hidden_size": 8, "max_history_length": 6, "initializer_range": 0.3}
    return SSNAConfig(**{**sizes, **settings})


def build(states=STATES, **settings):
    return SSNA.from_states(states, config(**settings))


def test_sizes_come_from_the_states():
    model = build(num_layers=99)
    assert model.config.num_layers == 3 and model.config.state_size == 12 and model.num_items == NUM_ITEMS
    assert model.config.states == ORIGIN and model.embedding_dim == 8 and model.max_length == 6
    assert build(num_layers=2).embed(STATES.values[:, 1:]).shape == (NUM_ITEMS, 8)


def test_fewer_layers_than_cached_are_the_top_ones():
    top = ItemStates(STATES.values[:, 1:], ORIGIN)
    assert torch.equal(build(num_layers=2).item_weights, build(top, num_layers=2).item_weights)


def test_there_is_no_weight_for_any_single_item():
    model = build()
    twice = build(ItemStates(STATES.values.repeat(5, 1, 1), ORIGIN))
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in twice.parameters())


def test_loss_is_the_mean_cross_entropy_over_all_next_items():
    model = build().eval()
    rows, lengths = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]]), torch.tensor([4, 2])
    losses = []
    for row, length in zip(rows, lengths, strict=True):
        for cut in range(1, int(length)):
            scores = model.scores(row[None, :cut], torch.ones(1, cut))
            losses.append(functional.cross_entropy(scores, row[cut : cut + 1]))
    loss = model.training_loss(rows, lengths, torch.Generator())
    assert torch.allclose(loss, torch.stack(losses).mean(), atol=1e-5)


def test_training_moves_every_weight_and_never_the_states():
    model = build(adapter_dropout=0.2).train()
    before = STATES.values.clone()
    rows = torch.tensor(SEQUENCES)
    model.training_loss(rows, torch.full((len(rows),), 5), torch.Generator()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if "key.bias" not in name:  # softmax does not see it
            assert parameter.grad.abs().sum() > 0, name
    assert torch.equal(STATES.values, before) and STATES.values.grad is None


@pytest.mark.parametrize("chunk", [1, 4, 8])
def test_pieces_of_the_catalog_make_no_difference(chunk):
    whole = build(dropout=0.0, attention_dropout=0.0, adapter_dropout=0.0).train()
    pieces = build(dropout=0.0, attention_dropout=0.0, adapter_dropout=0.0, item_chunk_size=chunk).train()
    rows, lengths = torch.tensor(SEQUENCES), torch.full((NUM_ITEMS,), 5)
    losses = [model.training_loss(rows, lengths, torch.Generator()) for model in (whole, pieces)]
    for loss in losses:
        loss.backward()
    assert torch.allclose(*losses, atol=1e-6)
    for one, other in zip(whole.parameters(), pieces.parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, atol=1e-5)
    assert torch.allclose(whole.item_weights, pieces.item_weights, atol=1e-6)


def test_pieces_draw_the_same_dropout_again_in_the_backward_pass():
    """Else the gradient would be that of another loss: compare it with a finite difference."""
    model = build(item_chunk_size=2, dropout=0.0, attention_dropout=0.0, adapter_dropout=0.5).double().train()
    rows, lengths = torch.tensor(SEQUENCES), torch.full((NUM_ITEMS,), 5)
    weight = model.side.projection.weight

    def loss():
        torch.manual_seed(3)
        return model.training_loss(rows, lengths, torch.Generator())

    loss().backward()
    with torch.no_grad():
        weight[2, 5] += 1e-6
        above = loss()
        weight[2, 5] -= 2e-6
        below = loss()
    assert float(weight.grad[2, 5]) == pytest.approx(float(above - below) / 2e-6, rel=1e-4, abs=1e-8)


def test_item_embeddings_follow_the_weights():
    model = build(adapter_dropout=0.5)
    first = model.item_weights.clone()
    assert torch.equal(model.item_weights, first) and not model.item_weights.requires_grad
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model.train().training_loss(torch.tensor(SEQUENCES), torch.full((NUM_ITEMS,), 5), torch.Generator()).backward()
    optimizer.step()
    assert model.training
    changed = model.item_weights.clone()
    assert not torch.allclose(changed, first, atol=1e-3)
    assert torch.allclose(changed, model.embed(STATES.values), atol=1e-6)
    fresh = build(adapter_dropout=0.5)
    fresh.load_state_dict({**model.state_dict(), "item_table": torch.zeros(NUM_ITEMS, 8)})
    assert torch.allclose(fresh.item_weights, changed, atol=1e-6)


def test_half_precision_states_stay_half_until_they_are_used():
    half = ItemStates(STATES.values.bfloat16(), ORIGIN)
    model = build(half)
    assert model.item_weights.dtype == torch.float32
    assert torch.allclose(model.item_weights, build().item_weights, atol=0.1)


def test_a_new_process_without_states_gives_the_same_bits(tmp_path):
    model = build()
    fit_recommender(model, SEQUENCES, epochs=2)
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    command = [sys.executable, "-c", IN_A_NEW_PROCESS.format(histories=HISTORIES), str(tmp_path)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert printed.strip() == model.content_hash()
    states, scores = torch.load(tmp_path / "out")
    batch = pad_histories(HISTORIES)
    assert torch.equal(states, model.encode(*batch)) and torch.equal(scores, model.scores(*batch))


def test_a_loaded_model_scores_and_needs_states_to_train(tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    for loaded in (SSNA.from_pretrained(tmp_path), SSNA.from_pretrained(str(tmp_path), local_files_only=True)):
        assert isinstance(load_recommender(tmp_path), SSNA)
        assert torch.equal(loaded.scores(*pad_histories(HISTORIES)), model.scores(*pad_histories(HISTORIES)))
        with pytest.raises(InputError, match="training needs the cached states.*attach them with model.attach"):
            fit_recommender(loaded, SEQUENCES, epochs=1)
        before = loaded.content_hash()
        assert loaded.attach(STATES).content_hash() == before == model.content_hash()
        fit_recommender(loaded, SEQUENCES, epochs=1)
        assert loaded.content_hash() != before


def test_a_seed_decides_all():
    hashes = []
    for seed in (1, 1, 2):
        torch.rand(3)  # the global state must not matter
        state = torch.get_rng_state()
        model = build(seed=seed)
        fit_recommender(model, SEQUENCES, epochs=2, batch_size=4, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        hashes.append(model.content_hash())
    assert hashes[0] == hashes[1] != hashes[2]


def test_the_rest_of_the_house_takes_it_as_a_recommender():
    model = build()
    samples = [type("Row", (), {"history": tuple(row[:-1]), "target": row[-1]})() for row in SEQUENCES]
    assert evaluate_ranking(history_scorer(model), samples).metrics()["users"] == NUM_ITEMS
    states = model.encode(*pad_histories(HISTORIES))
    assert states.shape == (4, 4, 8) and not states[3].any()
    assert not model.scores(*pad_histories([[]])).any()


def test_another_catalog_is_attached_and_recommended_from(tmp_path):
    model = build()
    other = ItemStates(torch.cat([STATES.values[:2], torch.randn(3, 3, 12)]), {**ORIGIN, "items": "others"})
    before = model.item_weights.clone()
    model.attach(other)
    assert model.num_items == model.config.num_items == 5
    assert torch.allclose(model.item_weights[:2], before[:2], atol=1e-6)
    batch = pad_histories([[4], [0, 1]])
    assert model.scores(*batch).shape == (2, 5)
    model.save_pretrained(tmp_path)
    assert torch.equal(SSNA.from_pretrained(tmp_path).scores(*batch), model.scores(*batch))


@pytest.mark.parametrize(
    ("origin", "message"),
    [
        ({**ORIGIN, "base_model": "org/other"}, "base_model was 'org/tiny' and is 'org/other'"),
        ({**ORIGIN, "fingerprint": {"hidden_size": 13}}, "fingerprint.hidden_size was 12 and is 13"),
        ({**ORIGIN, "template": {"marker": ">>"}}, "template.marker was '' and is '>>'"),
        ({**ORIGIN, "pooling": "mean"}, "pooling was 'last' and is 'mean'"),
    ],
)
def test_states_of_another_meaning_are_refused(origin, message):
    with pytest.raises(ArtifactError, match=f"not what this model was trained on: {message}; cache the catalog with"):
        build().attach(ItemStates(STATES.values, origin))


def test_a_local_copy_of_the_base_model_may_have_another_name():
    build().attach(ItemStates(STATES.values, {**ORIGIN, "base_model": "my-copy", "is_local": True}))


def test_states_of_another_size_are_refused():
    model = build()
    for values in (STATES.values[:, :2], torch.zeros(4, 3, 7)):
        with pytest.raises(InputError, match=r"states must be \[items, at least 3 layers, 12\], got \["):
            model.attach(ItemStates(values, ORIGIN))
    with pytest.raises(ConfigurationError, match="pooling must be that of the cached states, 'last', got 'mean'"):
        build(pooling="mean")
