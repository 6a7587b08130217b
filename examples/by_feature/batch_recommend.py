"""Recommend for many users, from parquet to parquet, in as many processes as `accelerate` starts.

    accelerate launch examples/by_feature/batch_recommend.py --model FOLDER --users users.parquet --output_dir recs

Reads one row a user: an id, and a list of item ids in time order. Writes a folder of parquet shards, and holds the
users of one shard in memory. The same command goes on after a kill. All work is done by
`peft_bituning.batch.batch_recommendation.recommend_parquet`.
"""

import argparse
import logging
import sys
from datetime import timedelta
from pathlib import Path

import torch

from peft_bituning import LaserRecommender
from peft_bituning.batch.batch_recommendation import recommend_parquet
from peft_bituning.errors import BiTuningError, ConfigurationError
from peft_bituning.launch import launched_state, use_all_cores


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="folder of a saved LaserRecommender, or its Hub repository")
    add("--users", required=True, nargs="+", metavar="PATH", help="parquet files: paths, globs or folders")
    add("--output_dir", required=True, help="folder of the shards, part-00000.parquet and so on")
    add("--k", type=int, default=10, help="items a user at most (%(default)s)")
    add("--keep_seen", action="store_true", help="recommend items of the history too")
    add("--candidates", metavar="FILE", help="text file of item ids to choose from, one a line; the default is all")
    add(
        "--on_unknown",
        choices=["error", "ignore"],
        default="error",
        help="stop at items that are not in the catalog, or count them and leave them out (%(default)s)",
    )
    add("--batch_size", type=int, default=32, help="users a forward pass (%(default)s)")
    add("--rows_per_shard", type=int, default=10_000, help="users a shard, and in memory at once (%(default)s)")
    add("--user_column", default="user_id", help="column of the user id (%(default)s)")
    add("--history_column", default="history", help="column of the item ids in time order (%(default)s)")
    add("--base_model", help="the language model, where its recorded name does not resolve here")
    add(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        default="float32",
        help="type of the frozen weights (%(default)s)",
    )
    add("--overwrite", action="store_true", help="remove the shards of an earlier run")
    add("--disable_tqdm", action="store_true", help="show no progress bar")
    return parser.parse_args(argv)


def read_candidates(path: str) -> list[str]:
    """Read item ids, one a line."""
    try:
        return [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"--candidates must be a readable text file, got {path!r}: {error}") from error


def main(argv: list[str]) -> None:
    """Run the whole job."""
    arguments = parse_arguments(argv)
    state = launched_state(timeout=timedelta(days=1))  # a process may have to wait for another's last shard
    if state.device.type == "cpu":
        use_all_cores()
    logging.basicConfig(format="%(message)s", level=logging.INFO if state.is_main_process else logging.ERROR)
    for chatty in ("httpx", "accelerate", "datasets"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    candidates = None if arguments.candidates is None else read_candidates(arguments.candidates)
    recommender = LaserRecommender.from_pretrained(
        arguments.model,
        base_model=arguments.base_model,
        device=state.device,
        dtype=getattr(torch, arguments.dtype),
    )
    report = recommend_parquet(
        recommender,
        arguments.users,
        arguments.output_dir,
        k=arguments.k,
        filter_seen=not arguments.keep_seen,
        candidates=candidates,
        on_unknown=arguments.on_unknown,
        batch_size=arguments.batch_size,
        rows_per_shard=arguments.rows_per_shard,
        user_column=arguments.user_column,
        history_column=arguments.history_column,
        overwrite=arguments.overwrite,
        show_progress_bar=not arguments.disable_tqdm,
    )
    if state.is_main_process:
        print(
            f"{report.users:,} users in {report.shards:,} shards ({report.new_shards:,} made now), "
            f"{report.cold_starts:,} cold starts, {report.unknown_items:,} unknown items left out; "
            f"saved to {arguments.output_dir}"
        )


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except BiTuningError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last shard", file=sys.stderr)
        sys.exit(130)
