"""Train on one or more processes: `accelerate launch --config_file ... two_processes.py BASE_MODEL OUTPUT BATCH_SIZE
[budget]`; with `budget` a static prefix, every cut, and passes of few tokens.

Each process writes how many items and users it encoded itself, and its share of the frozen weights.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from peft_bituning import BiTuningConfig
from peft_bituning.catalog.encoder import HistoryEncoder
from peft_bituning.data import Interactions, ItemCatalog
from peft_bituning.recommenders import Precomputed
from peft_bituning.training import LaserArguments, fit


def main(base_model: str, folder: Path, batch_size: int, budget: bool) -> None:
    """Train two epochs of stage 1 and one of stage 2 on 13 rows, four an update: the last update has one row."""
    torch.set_num_threads(1)
    if os.environ.get("ACCELERATE_USE_FSDP"):  # which accelerate shards on accelerators alone: let a CPU pass for one
        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    encoded = {"user": 0, "item": 0}
    forward = HistoryEncoder.forward

    def counted(self: HistoryEncoder, histories: Any, kind: str = "user", *rest: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            encoded[kind] += len(histories)
        return forward(self, histories, kind, *rest, **named)

    HistoryEncoder.forward = counted  # type: ignore[assignment]
    catalog = ItemCatalog.from_records({"item_id": f"i{n}", "title": f"thing {n} of {n * n}"} for n in range(11))
    histories = tuple(tuple((user * 3 + step) % 11 for step in range(4 + user % 3)) for user in range(13))
    data = Interactions(catalog, tuple(f"u{user}" for user in range(13)), histories)
    embeddings = torch.randn(11, 8, generator=torch.Generator().manual_seed(0))
    config = BiTuningConfig(
        num_virtual_tokens=2,
        num_experts=2,
        encoder_hidden_size=16,
        encoder_num_layers=2,
        encoder_num_attention_heads=2,
        router_aux_loss_coef=0.1,
        center_embeddings=not budget,
    )
    arguments = LaserArguments.paper(
        str(folder),
        stage1_epochs=2,
        stage2_epochs=1,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=3,
        learning_rate=1e-2,
        stage2_learning_rate=None,
        temperature=0.05 if budget else 0.2,
        cuts="every_cut" if budget else "last_cut",
        max_tokens_per_pass=260 if budget else None,
        logging_steps=1,
        disable_tqdm=True,
    )
    if budget:
        config.prefix_encoder = "static"
    found = fit(data, base_model=base_model, config=config, arguments=arguments, id_recommender=Precomputed(embeddings))
    frozen = [each for name, each in found.model.named_parameters() if "bituning_" not in name]
    here = sum((each.to_local() if isinstance(each, DTensor) else each).numel() for each in frozen)
    share = here / sum(each.numel() for each in frozen)
    (folder / f"process-{os.environ.get('RANK', '0')}.json").write_text(json.dumps({**encoded, "frozen": share}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:] == ["budget"])
