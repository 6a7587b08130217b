"""Encodes a catalog of 26 items, four per block: `python encoding_runs.py kills|processes SAVED BASE_MODEL WORK`.

`kills`: one process imports everything and then forks: for each point a child that dies of a real signal, and a child
that goes on. Nothing in the package knows of this: the points are wrapped around it from outside. Writes `kills.json`.

`processes`: every process that a launcher started encodes its share, then one block is damaged and all encode again.
Each writes which items it encoded, and its table's checksum, to `process-N.json`.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

BLOCK_SIZE = 4
RECORDS = [{"item_id": f"new {n}", "title": f"thing {n} of {n * n}", "brand": "Acme"} for n in range(14)]


def encoder_of(recommender: Any, batch_size: int = 3) -> Any:
    """Return an encoder of the items of a trained recommender, its own 12 and 14 new ones."""
    from peft_bituning.catalog import HistoryEncoder
    from peft_bituning.data import PromptEncoder
    from peft_bituning.data.collator import HistoryCollator

    collator = recommender.encoder.collator
    catalog = recommender.items.extended(RECORDS)
    prompts = PromptEncoder(recommender.template, recommender.base.tokenizer, catalog, collator.prompts.max_length)
    collator = HistoryCollator(prompts, collator.pad_token_id, collator.max_items)
    recommender.model.set_adapter("items")
    return HistoryEncoder(
        recommender.model, collator, recommender.id_recommender, recommender.device, batch_size=batch_size
    )


def blocks_in(folder: Path) -> Any:
    """Return the block file of the catalog."""
    from peft_bituning.catalog import table_blocks

    return table_blocks(folder, 12 + len(RECORDS), {"weights": "these"}, BLOCK_SIZE)


def watch_items() -> list[int]:
    """Return a list that takes the catalog index of every item that is encoded from here on."""
    from peft_bituning.catalog import HistoryEncoder

    seen: list[int] = []
    forward = HistoryEncoder.forward

    def watched(self: Any, histories: Any, *rest: Any) -> Any:
        seen.extend(item for (item,) in histories)
        return forward(self, histories, *rest)

    HistoryEncoder.forward = watched  # type: ignore[method-assign]
    return seen


def kill(*_: Any) -> None:
    """Die as under `kill -9`."""
    os.kill(os.getpid(), signal.SIGKILL)


def at(owner: Any, name: str, n: int, when: str, only: str = "") -> Callable[[], None]:
    """Return what lets this process die at the n-th call of `owner.name`; `only` is the end of a replaced file's name.

    Where `when` is `half`, half of the block that the call wrote is on the disk, and not in the journal.
    """

    def install() -> None:
        original = getattr(owner, name)
        left = n

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= not only or str(args[-1]).endswith(only)
            due = left == 0 and (not only or str(args[-1]).endswith(only))
            if due and when == "before":
                kill()
            result = original(*args, **kwargs)
            if due and when in ("half", "not in the journal"):
                _undo(*args, half=when == "half")
            if due:
                kill()
            return result

        setattr(owner, name, wrapped)

    return install


def _undo(file: Any, block: int, rows: Any, rank: int, half: bool) -> None:
    """Take back the second half of a block, and its line of the journal."""
    if half:
        with file.path.open("r+b") as stream:
            end = file.path.stat().st_size - (file.shape[0] - file.rows(block).stop) * file.shape[1] * 4
            stream.seek(end - rows.nbytes // 2)
            stream.write(bytes(rows.nbytes // 2))
    journal = file.folder / f"blocks-{rank}.jsonl"
    os.truncate(journal, journal.stat().st_size - 30)


def points() -> dict[str, tuple[Callable[[], None], int]]:
    """Return where to die, and how many blocks are finished by then; six of four items and one of two."""
    from peft_bituning.block_file import BlockFile
    from peft_bituning.catalog import HistoryEncoder

    table, origin = "/item_table.safetensors", "/origin.json"
    return {
        "first forward pass": (at(HistoryEncoder, "forward", 1, "before"), 0),
        "second forward pass of the third block": (at(HistoryEncoder, "forward", 6, "after"), 2),
        "description written, not in its place": (at(os, "replace", 1, "before", origin), 0),
        "described, the file not written": (at(os, "replace", 1, "after", origin), 0),
        "file written, not in its place": (at(os, "replace", 1, "before", table), 0),
        "file just in its place": (at(os, "replace", 1, "after", table), 0),
        "first block half-written": (at(BlockFile, "write", 1, "half"), 0),
        "fourth block half-written": (at(BlockFile, "write", 4, "half"), 3),
        "fourth block written, not in the journal": (at(BlockFile, "write", 4, "not in the journal"), 3),
        "fourth block finished": (at(BlockFile, "write", 4, "after"), 4),
        "last block half-written": (at(BlockFile, "write", 7, "half"), 6),
        "all finished": (at(BlockFile, "write", 7, "after"), 7),
    }


def finished(folder: Path) -> list[int]:
    """Return the blocks that are finished."""
    file = blocks_in(folder).begun()
    return [] if file is None else sorted(file.finished())


def fork(action: Callable[[], Any]) -> int:
    """Run an action in a child; return its wait status."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            action()
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1]


def kills(saved: Path, base_model: Path, work: Path) -> None:
    """Visit every point."""
    import torch

    from peft_bituning import LaserRecommender
    from peft_bituning.catalog import encode_items_into

    torch.set_num_threads(1)
    encoder = encoder_of(LaserRecommender.from_pretrained(saved, base_model=base_model, device="cpu"))
    outcomes: dict[str, Any] = {}
    for number, (name, (install, _)) in enumerate({"undisturbed": (lambda: None, 0), **points()}.items()):
        folder, result = work / f"point-{number}", work / f"point-{number}.json"

        def go_on(folder: Path = folder, result: Path = result) -> None:
            seen = watch_items()
            table = encode_items_into(encoder, blocks_in(folder))
            result.write_text(json.dumps({"items": seen, "checksum": table.checksum()}))

        def die(folder: Path = folder, install: Callable[[], None] = install) -> None:
            install()
            encode_items_into(encoder, blocks_in(folder))

        status = fork(die)
        before = finished(folder)
        code = fork(go_on)
        outcomes[name] = {
            "signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else None,
            "resumed": code,
            "before": before,
            "after": finished(folder),
            "files": sorted(path.name for path in folder.iterdir()),
            **json.loads(result.read_text()),
        }
    (work / "kills.json").write_text(json.dumps(outcomes))


def processes(saved: Path, base_model: Path, work: Path) -> None:
    """Encode twice, the second time one block alone."""
    import torch
    from accelerate import Accelerator, PartialState
    from accelerate.utils import DistributedType

    from peft_bituning import LaserRecommender
    from peft_bituning.catalog import encode_items_into
    from peft_bituning.training.sharding import prepare_model

    torch.set_num_threads(1)
    if os.environ.get("ACCELERATE_USE_FSDP"):  # which accelerate shards on accelerators alone: let a CPU pass for one
        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    accelerator = Accelerator()
    encoder = encoder_of(LaserRecommender.from_pretrained(saved, base_model=base_model, device="cpu"))
    prepare_model(accelerator, encoder.model)
    blocks = blocks_in(work / "table")
    seen = watch_items()
    outcomes = []
    for again in (False, True):
        if again and accelerator.is_main_process:
            damaged = bytearray(blocks.path.read_bytes())
            damaged[-12 * 32 * 4] ^= 1  # item 14 of 26: of block 3
            blocks.path.write_bytes(damaged)
        accelerator.wait_for_everyone()
        table = encode_items_into(encoder, blocks)
        outcomes.append({"items": list(seen), "checksum": table.checksum()})
        seen.clear()
        accelerator.wait_for_everyone()
    sharded = hasattr(encoder.model, "unshard")
    found = {"processes": accelerator.num_processes, "sharded": sharded, "runs": outcomes}
    (work / f"process-{accelerator.process_index}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    {"kills": kills, "processes": processes}[sys.argv[1]](*map(Path, sys.argv[2:]))
