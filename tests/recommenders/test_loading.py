"""Saved recommenders: bit-exact in a new process, and a clear error for everything that does not fit."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_bituning.errors import ArtifactError, ConfigurationError
from peft_bituning.recommenders import BERT4Rec, Precomputed, SASRec, build_recommender, load_recommender, pad_histories

HISTORIES = [[1, 2, 3], [4], [5, 6, 7, 8]]
KINDS = ["sasrec", "bert4rec", "precomputed"]
IN_A_NEW_PROCESS = """
import sys, torch
from peft_bituning.recommenders import load_recommender, pad_histories
for folder in sys.argv[1:]:
    model = load_recommender(folder)
    batch = pad_histories({histories})
    torch.save([model.encode(*batch), model.scores(*batch)], folder + "/out")
    print(model.content_hash())
"""


def build(kind):
    if kind == "precomputed":
        return Precomputed(torch.randn(9, 8), max_length=6)
    return build_recommender(kind, 9, seed=3, hidden_size=8, max_history_length=6)


@pytest.fixture(params=["sasrec", "bert4rec"])
def saved(request, tmp_path):
    build(request.param).save_pretrained(tmp_path)
    return tmp_path


def test_a_new_process_gives_the_same_bits(tmp_path):
    models = {tmp_path / kind: build(kind) for kind in KINDS}
    for folder, model in models.items():
        model.save_pretrained(folder)
    command = [sys.executable, "-c", IN_A_NEW_PROCESS.format(histories=HISTORIES), *map(str, models)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert printed.split() == [model.content_hash() for model in models.values()]
    for folder, model in models.items():
        states, scores = torch.load(folder / "out")
        assert torch.equal(states, model.encode(*pad_histories(HISTORIES)))
        assert torch.equal(scores, model.scores(*pad_histories(HISTORIES)))


@pytest.mark.parametrize("model_class", [SASRec, BERT4Rec])
def test_both_ways_of_from_pretrained_agree(model_class, tmp_path):
    model = build(model_class.recommender_type)
    model.save_pretrained(tmp_path)
    strict = model_class.from_pretrained(tmp_path)
    upstream = model_class.from_pretrained(str(tmp_path), local_files_only=True)
    assert strict.content_hash() == upstream.content_hash() == model.content_hash()
    expected = model.encode(*pad_histories(HISTORIES))
    assert torch.equal(strict.encode(*pad_histories(HISTORIES)), expected)
    assert torch.equal(upstream.encode(*pad_histories(HISTORIES)), expected)
    assert not strict.training and not upstream.training


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


NAME = "encoder.embeddings.position_embeddings.weight"


@pytest.mark.parametrize("arguments", [{}, {"local_files_only": True}])
def test_missing_and_unexpected_tensors(saved, arguments):
    model_class = type(load_recommender(saved))
    rewrite(saved, lambda tensors: tensors.pop(NAME))
    with pytest.raises(ArtifactError, match=rf"missing tensors \['{NAME}'\]"):
        model_class.from_pretrained(saved, **arguments)
    build(model_class.recommender_type).save_pretrained(saved)
    rewrite(saved, lambda tensors: tensors.update({"extra": torch.zeros(1)}))
    with pytest.raises(ArtifactError, match="extra"):
        model_class.from_pretrained(saved, **arguments)


@pytest.mark.parametrize("arguments", [{}, {"local_files_only": True}])
def test_mis_shaped_tensors(saved, arguments):
    model_class = type(load_recommender(saved))
    rewrite(saved, lambda tensors: tensors.update({NAME: torch.zeros(5, 8)}))
    with pytest.raises(ArtifactError):
        model_class.from_pretrained(saved, **arguments)


def test_a_tensor_of_another_type(saved):
    rewrite(saved, lambda tensors: tensors.update({NAME: tensors[NAME].half()}))
    with pytest.raises(ArtifactError, match="must be .* torch.float32 by config.json, got .* torch.float16"):
        load_recommender(saved)


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.999])
@pytest.mark.parametrize("kind", KINDS)
def test_a_truncated_file(kind, kept, tmp_path):
    build(kind).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(ArtifactError, match=r"model.safetensors cannot be read .* truncated or damaged"):
        load_recommender(tmp_path)


def test_missing_files(saved):
    (saved / "model.safetensors").unlink()
    with pytest.raises(ArtifactError, match="model.safetensors is missing"):
        load_recommender(saved)
    (saved / "config.json").unlink()
    with pytest.raises(ArtifactError, match="config.json cannot be read"):
        load_recommender(saved)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "must hold a JSON object, got list"),
        (
            '{"model_type": "bert"}',
            "model_type must be one of sasrec, bert4rec, precomputed.*, got 'bert'",
        ),
        ("{}", "got None"),
        ('{"model_type": "sasrec", "num_items": "many"}', "does not describe a SASRec"),
        ('{"model_type": "sasrec", "num_items": 0}', "num_items must be at least 1"),
    ],
)
def test_bad_configs(saved, text, message):
    (saved / "config.json").write_text(text)
    with pytest.raises(ArtifactError, match=message):
        load_recommender(saved)


def test_a_config_of_another_catalog(saved):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, "num_items": 10}))
    with pytest.raises(ArtifactError, match="by config.json, got"):
        load_recommender(saved)


def test_a_folder_of_the_other_kind(tmp_path):
    build("sasrec").save_pretrained(tmp_path)
    with pytest.raises(ArtifactError, match="use load_recommender"):
        BERT4Rec.from_pretrained(tmp_path)


def test_build_is_seeded_and_leaves_the_global_state():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, second = build_recommender("sasrec", 9, seed=1), build_recommender("sasrec", 9, seed=1)
    assert torch.equal(torch.rand(1), expected)
    assert first.content_hash() == second.content_hash() != build_recommender("sasrec", 9, seed=2).content_hash()
    with pytest.raises(ConfigurationError, match="kind must be one of sasrec, bert4rec, got 'gru'"):
        build_recommender("gru", 9)
