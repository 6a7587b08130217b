"""Push in one process, load in another, through the Hub's own client and a stand-in of its HTTP interface."""

import json

import numpy as np
import pytest

from peft_bituning import LaserRecommender
from peft_bituning.errors import ArtifactError

REPO = "someone/laser-tiny"
PUSH = """
import sys
import torch
from peft_bituning import LaserRecommender
torch.set_num_threads(1)
folder, base, repo = sys.argv[1:]
recommender = LaserRecommender.from_pretrained(folder, base_model=base, device="cpu")
print(recommender.push_to_hub(repo))
"""
LOAD = """
import json, sys
import numpy as np, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from peft_bituning import LaserRecommender
from peft_bituning.errors import ArtifactError
torch.set_num_threads(1)
repo, base, histories, target = sys.argv[1:]
recommender = LaserRecommender.from_pretrained(repo, base_model=base, device="cpu")
np.save(target, recommender.encode_users(json.loads(histories)))
llm = AutoModelForCausalLM.from_pretrained(base)
adapter = PeftModel.from_pretrained(llm, repo)
prompt = recommender.encoder.collator([[0, 1]])
states = recommender.id_recommender.encode(prompt.item_indices, prompt.item_mask)
inputs = {"collaborative_embeds": states, "collaborative_mask": prompt.item_mask}
with torch.no_grad():
    bare = adapter(input_ids=prompt.input_ids, attention_mask=prompt.attention_mask, **inputs).pooler_output
try:
    LaserRecommender.from_pretrained("someone/nothing", base_model=base)
except ArtifactError as error:
    missing = str(error)
try:
    LaserRecommender.from_pretrained(repo, base_model=base, revision="no-such-branch")
except ArtifactError as error:
    revision = str(error)
print(json.dumps({
    "recommended": recommender.recommend(json.loads(histories), k=5),
    "bare": bool(np.array_equal(bare.numpy(), recommender.encode_users([recommender.items.item_ids[:2]]))),
    "missing": missing,
    "revision": revision,
}))
"""

PUSH_ADAPTER = """
import sys
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from peft_bituning import BiTuningConfig
base, repo, task, target = sys.argv[1:]
llm = AutoModelForCausalLM.from_pretrained(base)
config = BiTuningConfig(prefix_encoder="linear", collaborative_dim=4, num_virtual_tokens=2, task_type=task)
model = get_peft_model(llm, config).eval()
model.push_to_hub(repo)
torch.save(model(torch.tensor([[5, 6]]), collaborative_embeds=torch.ones(1, 1, 4)).pooler_output, target)
"""
PULL_ADAPTER = """
import sys
import torch
import peft_bituning
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, repo, target = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), repo)
found = model(torch.tensor([[5, 6]]), collaborative_embeds=torch.ones(1, 1, 4)).pooler_output
print(type(model).__name__, torch.equal(found, torch.load(target)))
"""


@pytest.fixture(scope="module")
def pushed(trained, local_hub, run_python, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("push")
    environment = local_hub.environment(folder / "home")
    return run_python(PUSH, trained.folder, trained.base_folder, REPO, cwd=folder, **environment).strip()


def test_a_push_commits_the_saved_folder_and_nothing_else(pushed, trained, local_hub) -> None:
    (commit, files), *_ = local_hub.commits[REPO].items()
    assert pushed == f"{local_hub.url}/{REPO}/commit/{commit}"
    listed = json.loads((trained.folder / "manifest.json").read_text())["sha256"]
    assert sorted(files) == sorted([*listed, "manifest.json"])
    same = [name for name in listed if name != "README.md"]
    assert all(files[name] == (trained.folder / name).read_bytes() for name in same)
    card = files["README.md"].decode()
    assert f'LaserRecommender.from_pretrained("{REPO}"' in card
    assert "inside this folder" not in card


def test_a_new_process_loads_what_was_pushed(pushed, trained, local_hub, run_python, tmp_path) -> None:
    ids = trained.data.items.item_ids
    histories = [[ids[item] for item in history] for history in trained.data.histories[:4]] + [[]]
    target = tmp_path / "users.npy"
    environment = local_hub.environment(tmp_path / "home")
    out = run_python(
        LOAD, REPO, trained.base_folder, json.dumps(histories), target, cwd=tmp_path, **environment
    ).splitlines()[-1]
    found = json.loads(out)
    expected = trained.recommender.recommend(histories, k=5)
    assert [[tuple(pair) for pair in row] for row in found["recommended"]] == expected
    assert np.array_equal(np.load(target), trained.recommender.encode_users(histories))
    assert found["bare"], "PeftModel.from_pretrained of the repository must give the users' embeddings"
    assert "'someone/nothing' is neither a folder here nor a repository on the Hub" in found["missing"]
    assert "check name, revision and token" in found["revision"]
    assert any(request.startswith("GET /someone/laser-tiny/resolve/") for request in local_hub.requests)


@pytest.mark.parametrize("task", ["FEATURE_EXTRACTION", "CAUSAL_LM"])
def test_a_plain_peft_model(trained, local_hub, run_python, tmp_path, task) -> None:
    """`push_to_hub` of PEFT itself, loaded in another process."""
    repo, target = f"someone/adapter-{task.lower()}", tmp_path / "expected.pt"
    environment = local_hub.environment(tmp_path / "home")
    run_python(PUSH_ADAPTER, trained.base_folder, repo, task, target, cwd=tmp_path, **environment)
    (files,) = local_hub.commits[repo].values()
    assert set(files) == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    wrapper = "PeftModelForFeatureExtraction" if task == "FEATURE_EXTRACTION" else "PeftModelForCausalLM"
    out = run_python(PULL_ADAPTER, trained.base_folder, repo, target, cwd=tmp_path, **environment)
    assert out.split() == [wrapper, "True"]


def test_offline_without_a_copy_is_an_error_that_says_so(tmp_path, trained) -> None:
    with pytest.raises(ArtifactError, match="'someone/never-seen' is no folder here, is not in the Hub cache"):
        LaserRecommender.from_pretrained("someone/never-seen", base_model=trained.base_folder)
    with pytest.raises(ArtifactError, match="is no folder here and cannot be a Hub repository; check the path"):
        LaserRecommender.from_pretrained(tmp_path / "no" / "such" / "folder", base_model=trained.base_folder)
