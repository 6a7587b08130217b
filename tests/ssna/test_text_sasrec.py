"""The sequence model over computed item embeddings: inputs and targets alike, causal, frozen outside training."""

import torch
from torch import nn
from torch.nn import functional

from peft_bituning.recommenders import SASRec, SASRecConfig, fit_recommender, pad_histories
from peft_bituning.ssna.model import TextSASRec

SMALL = {"num_items": 9, "hidden_size": 8, "max_history_length": 6, "initializer_range": 0.5}


class Looked(TextSASRec):
    """Embeddings from a table, so that the model must equal SASRec with that table."""

    recommender_type = "looked"

    def __init__(self, config, dropout=0.0):
        super().__init__(config)
        self.table = nn.Parameter(torch.randn(config.num_items, config.hidden_size))
        self.dropout = nn.Dropout(dropout)
        self.calls = 0
        self.post_init()

    def embed_items(self):
        self.calls += 1
        return self.dropout(self.table)


def pair():
    """A SASRec and a model that computes the same embeddings."""
    torch.manual_seed(0)
    ids, text = SASRec(SASRecConfig(**SMALL)), Looked(SASRecConfig(**SMALL))
    weights = ids.state_dict()
    weights["table"] = weights.pop("encoder.embeddings.word_embeddings.weight")
    text.load_state_dict(weights)
    return ids.eval(), text.eval()


def test_with_a_table_of_embeddings_it_is_sasrec():
    ids, text = pair()
    batch = pad_histories([[1, 2, 3], [4], [5, 6, 7, 8, 0, 1, 2], []])
    assert torch.allclose(text.encode(*batch), ids.encode(*batch), atol=1e-6)
    assert torch.allclose(text.scores(*batch), ids.scores(*batch), atol=1e-5)
    rows, lengths = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]]), torch.tensor([4, 2])
    losses = [model.training_loss(rows, lengths, torch.Generator()) for model in (ids, text)]
    for loss in losses:
        loss.backward()
    assert torch.allclose(*losses, atol=1e-6)
    assert torch.allclose(text.table.grad, ids.item_weights.grad_fn.next_functions[0][0].variable.grad, atol=1e-5)


def test_a_step_embeds_the_catalog_once():
    _, text = pair()
    text.training_loss(torch.tensor([[1, 2, 3]]), torch.tensor([3]), torch.Generator())
    assert text.calls == 1


def test_item_weights_are_frozen_and_without_dropout():
    model = Looked(SASRecConfig(**SMALL), dropout=0.9).train()
    assert torch.equal(model.item_weights, model.table) and not model.item_weights.requires_grad
    assert model.training and model.embed_items().requires_grad


def test_there_are_no_word_embeddings():
    _, text = pair()
    assert not any("word_embeddings" in name for name in text.state_dict())


def test_a_cycle_is_learned():
    model = Looked(SASRecConfig(num_items=9, hidden_size=16, dropout=0.0, attention_dropout=0.0))
    sequences = [[(start + step) % 9 for step in range(6)] for start in range(9)]
    fit_recommender(model, sequences, epochs=60, batch_size=9, learning_rate=5e-3)
    scores = model.scores(*pad_histories([row[:-1] for row in sequences]))
    assert scores.argmax(1).tolist() == [row[-1] for row in sequences]
    assert functional.cross_entropy(scores, torch.tensor([row[-1] for row in sequences])) < 0.5
