"""An iLoRA model in place of a Bi-Tuning one in the package's own encoder and training loop."""

from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from peft import get_peft_model

from peft_bituning import ILoRAConfig
from peft_bituning.base_models import BaseModel
from peft_bituning.catalog.encoder import HistoryEncoder
from peft_bituning.data import PRESETS, Interactions, LeaveOneOut, PromptEncoder
from peft_bituning.data.collator import HistoryCollator
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
    model = get_peft_model(base.model, config)
    prompts = PromptEncoder(PRESETS["no_instruction"], base.tokenizer, tiny_data.items, 256)
    encoder = HistoryEncoder(
        model, HistoryCollator(prompts, 0, recommender.max_length), recommender, torch.device("cpu")
    )
    arguments = tiny_arguments(tmp_path, stage1_epochs=2, learning_rate=1e-3, cuts="every_cut")
    training = TwoStageTraining(
        Accelerator(), model, encoder, split, len(tiny_data.items), arguments, CheckpointStore(tmp_path / "kept", 1), {}
    )
    before = {name: each.clone() for name, each in training._weights().items()}
    stage1, stage2 = training.run()
    losses = [epoch["train_loss"] for epoch in training.state.epochs if epoch["stage"] == 1]
    assert len(losses) == 2 and losses[-1] < losses[0]
    assert [epoch["expert_load"] for epoch in training.state.epochs] == [None] * len(training.state.epochs)
    changed = {name for name, each in stage2.user_weights.items() if not torch.equal(each, before[name])}
    assert {name.split(".")[-2] for name in changed} >= {"lora_A", "lora_B", "ilora_gate"}
    assert stage1.item_side.table.embeddings.shape == (len(tiny_data.items), 32)
    training.set_weights(stage2.user_weights)
    table = encoder.encode_items(len(tiny_data.items))
    assert torch.isfinite(table).all()
    swapped = encoder.encode([[0, 1, 2]], collaborative_histories=[[7, 8]])
    assert not torch.allclose(encoder.encode([[0, 1, 2]]), swapped, atol=1e-4)
