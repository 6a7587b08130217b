"""Kills the caching of states at chosen moments and resumes it: `python killed_caching.py BASE_MODEL WORK_FOLDER`.

One process imports everything and then forks: for each point a child that dies of a real SIGKILL, and a child that
resumes. Nothing in the package knows of this: the points are wrapped around it from outside. Prints JSON.
"""

import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers.models.llama.modeling_llama import LlamaModel

from peft_bituning.base_models import load_base_model
from peft_bituning.block_file import BlockFile
from peft_bituning.data import ItemCatalog
from peft_bituning.ssna import ItemStates, cache_item_states

ITEMS = ItemCatalog.from_records({"item_id": f"i{n}", "title": f"thing {n} of {n * n}"} for n in range(11))
BLOCK = 4  # blocks of 4, 4 and 3 items


def die() -> None:
    """Die at once, without any cleaning up."""
    os.kill(os.getpid(), signal.SIGKILL)


def before_it_is_in_place(name: str) -> None:
    """Die with a file written and not yet under its name."""
    original = os.replace

    def replace(source: Any, target: Any) -> None:
        if Path(target).name == name:
            die()
        original(source, target)

    os.replace = replace  # type: ignore[assignment]


def in_a_forward_pass() -> None:
    """Die while the second block goes through the model."""
    seen = 0

    def count(_module: Any, _inputs: Any, output: Any) -> None:
        nonlocal seen
        seen += len(output.last_hidden_state)
        if seen > BLOCK:
            die()

    torch.nn.modules.module.register_module_forward_hook(
        lambda module, inputs, output: count(module, inputs, output) if isinstance(module, LlamaModel) else None
    )


def around_the_second_write(after: bool, damage: Callable[[BlockFile], None] = lambda file: None) -> None:
    """Die before or after the second block is written, the file left as `damage` leaves it."""
    original = BlockFile.write

    def write(file: BlockFile, block: int, values: Any) -> None:
        if block == 1 and not after:
            die()
        original(file, block, values)
        if block == 1:
            damage(file)
            die()

    BlockFile.write = write  # type: ignore[method-assign]


def half_a_block(file: BlockFile) -> None:
    """Leave the second block as a kill within its writing would: half its bytes, no line in the journal."""
    items = file.rows(1)
    place = file.folder / "states.safetensors"
    with place.open("r+b") as stream:
        row = file.shape[1] * file.shape[2] * 4
        stream.seek(place.stat().st_size - (file.shape[0] - items.stop) * row - len(items) * row // 2)
        stream.write(bytes(len(items) * row // 2))
    journal = file.folder / "blocks.jsonl"
    journal.write_text("\n".join(journal.read_text().splitlines()[:-1]) + "\n")


def half_a_line(file: BlockFile) -> None:
    """Leave the second block's line of the journal unfinished."""
    journal = file.folder / "blocks.jsonl"
    os.truncate(journal, journal.stat().st_size - 30)


# name: what is wrapped around the package, items that are left to the resumed run
POINTS: dict[str, tuple[Callable[[], None], int]] = {
    "before the description": (lambda: before_it_is_in_place("origin.json"), 11),
    "described, without a file": (lambda: before_it_is_in_place("states.safetensors"), 11),
    "in a forward pass": (in_a_forward_pass, 7),
    "second block not written": (lambda: around_the_second_write(after=False), 7),
    "second block half written": (lambda: around_the_second_write(after=True, damage=half_a_block), 7),
    "second block not in the journal": (lambda: around_the_second_write(after=True, damage=half_a_line), 7),
    "second block finished": (lambda: around_the_second_write(after=True), 3),
}


def cache(base_model: Path, folder: Path) -> dict[str, Any]:
    """Cache the states; return how many items went through the model, and the bytes of what is there then."""
    base = load_base_model(base_model)
    items = 0

    def count(_module: Any, _inputs: Any, output: Any) -> None:
        nonlocal items
        items += len(output.last_hidden_state)

    base.model.model.register_forward_hook(count)
    cache_item_states(base, ITEMS, folder, num_layers=2, batch_size=3, block_size=BLOCK)
    states = ItemStates.open(folder).values.contiguous()
    return {"items": items, "sha256": hashlib.sha256(states.numpy().tobytes()).hexdigest()}


def fork(action: Callable[[], Any]) -> int:
    """Run an action in a child; return its wait status."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            action()
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1]


def main() -> None:
    """Kill and resume at every point."""
    torch.set_num_threads(1)
    base_model, work = Path(sys.argv[1]), Path(sys.argv[2])
    outcomes: dict[str, Any] = {}

    def record(name: str, folder: Path) -> None:
        (work / f"{name}.json").write_text(json.dumps(cache(base_model, folder)))

    def killed(install: Callable[[], None], folder: Path) -> None:
        install()
        cache(base_model, folder)

    for number, (name, (install, left)) in enumerate({"uninterrupted": (lambda: None, 11), **POINTS}.items()):
        folder = work / str(number)
        status = fork(lambda install=install, folder=folder: killed(install, folder)) if name in POINTS else None  # type: ignore[misc]
        fork(lambda name=name, folder=folder: record(name, folder))  # type: ignore[misc]
        outcome = json.loads((work / f"{name}.json").read_text())
        signalled = status is not None and os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        outcomes[name] = {**outcome, "left": left, "killed": signalled}
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main()
