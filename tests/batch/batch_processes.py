"""Recommend from parquet: `accelerate launch ... batch_processes.py TRAINED BASE_MODEL USERS OUTPUT...`."""

import json
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from peft_bituning import LaserRecommender
from peft_bituning.batch.batch_recommendation import recommend_parquet


def kill_at_shard(number: int) -> None:
    """Make this process kill itself, as `kill -9` does, when it would put a shard into its place."""
    replace = os.replace

    def replace_or_die(source: Path, target: Path) -> None:
        if Path(target).name == f"part-{number:05d}.parquet":
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = replace_or_die


def main(trained: Path, base_model: Path, users: Path, *outputs: Path) -> None:
    """Recommend into every output folder, and write the report and what was asked of the model beside it."""
    torch.set_num_threads(1)
    recommender = LaserRecommender.from_pretrained(trained, base_model=base_model, device="cpu")
    made: list[int] = []
    encode = recommender.encoder.encode

    def encode_and_count(histories: list, *arguments: object, **settings: object) -> torch.Tensor:
        made.append(len(histories))
        return encode(histories, *arguments, **settings)

    recommender.encoder.encode = encode_and_count
    for output in outputs:
        made.clear()
        report = recommend_parquet(recommender, users, output, k=4, rows_per_shard=5, on_unknown="ignore")
        rank = os.environ.get("RANK", "0")
        output.with_name(f"{output.name}.{rank}.json").write_text(json.dumps({"made": made, "report": asdict(report)}))


if __name__ == "__main__":
    if "KILL_AT_SHARD" in os.environ:
        kill_at_shard(int(os.environ["KILL_AT_SHARD"]))
    main(*map(Path, sys.argv[1:]))
