"""An iLoRA model in place of a Bi-Tuning one in the package's own encoder and training loop."""

from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator

from peft_bituning import ILoRAConfig
from peft_bituning.assembly import assemble
from peft_bituning.base_models import BaseModel
from peft_bituning.data import Interactions, LeaveOneOut
from peft_bituning.recommenders import build_recommender
from peft_bituning.training import LaserArguments
from peft_bituning.training.checkpoint import CheckpointStore
from peft_bituning.training.stages import TwoStageTraining


def test_two_stages(
    tiny_base: Callable[[], BaseModel],
    tiny_data: Interactions,
    tiny_arguments: Callable[..., LaserArguments],
    tmp_path: Path,
) -> None:
    base, split = tiny_base(), LeaveOneOut(tiny_data.histories)
    recommender = build_recommender("sasrec", len(tiny_data.items), seed=0).eval()
    torch.manual_seed(0)
    config = ILoRAConfig(collaborative_dim=recommender.embedding_dim, pooling="suffix", collaborative_dropout=0.1)
    encoder = assemble(base, config, tiny_data.items, recommender, "no_instruction")
    arguments = tiny_arguments(tmp_path, stage1_epochs=2, learning_rate=1e-3, cuts="every_cut")
    store = CheckpointStore(tmp_path / "kept", 1)
    training = TwoStageTraining(Accelerator(), encoder, split, len(tiny_data.items), arguments, store, {})
    before = encoder.model.weights_out()
    stage1, stage2 = training.run()
    losses = [epoch["train_loss"] for epoch in training.state.epochs if epoch["stage"] == 1]
    assert len(losses) == 2 and losses[-1] < losses[0]
    assert [epoch["expert_load"] for epoch in training.state.epochs] == [None] * len(training.state.epochs)
    changed = {name for name, each in stage2.user_weights.items() if not torch.equal(each, before[name])}
    assert {name.split(".")[-2] for name in changed} >= {"lora_A", "lora_B", "ilora_gate"}
    assert stage1.item_side.table.embeddings.shape == (len(tiny_data.items), 32)
    encoder.model.weights_in(stage2.user_weights)
    table = encoder.encode_items(len(tiny_data.items))
    assert torch.isfinite(table).all()
    swapped = encoder.encode([[0, 1, 2]], collaborative_histories=[[7, 8]])
    assert not torch.allclose(encoder.encode([[0, 1, 2]]), swapped, atol=1e-4)
