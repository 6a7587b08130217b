"""Kills training runs at chosen moments and resumes them: `python killed_runs.py BASE_MODEL WORK_FOLDER`.

One process imports everything and then forks: for each point a child that dies of a real signal, and a child that
resumes. Nothing in the package knows of this: the points are wrapped around it from outside. Each worker writes
`outcomes-N.json`.
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Install = Callable[["Trigger"], None]
WORKERS = 2
KILL, INTERRUPT = signal.SIGKILL, signal.SIGINT


class Trigger:
    """Sends this process a signal the n-th time it is asked."""

    def __init__(self, n: int, number: signal.Signals) -> None:
        self.left = n
        self.number = number

    def due(self) -> bool:
        """Count one call; say whether it is the one."""
        self.left -= 1
        return self.left == 0

    def fire(self) -> None:
        """Send the signal."""
        os.kill(os.getpid(), self.number)


def around(owner: Any, name: str, when: str, only: Callable[..., bool] = lambda *a, **k: True) -> Install:
    """Return an installer that fires before or after a call of `owner.name`."""

    def install(trigger: Trigger) -> None:
        place = owner()
        original = getattr(place, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            due = only(*args, **kwargs) and trigger.due()
            if due and when == "before":
                trigger.fire()
            result = original(*args, **kwargs)
            if due and when == "after":
                trigger.fire()
            return result

        setattr(place, name, wrapped)

    return install


def half_a_file(trigger: Trigger) -> None:
    """Die within the writing of a checkpoint's tensors, half of them on the disk."""
    from peft_bituning.training import checkpoint

    original = checkpoint.save_file

    def save_file(tensors: Any, path: Path) -> None:
        original(tensors, path)
        if trigger.due():
            os.truncate(path, path.stat().st_size // 2)
            trigger.fire()

    checkpoint.save_file = save_file


def half_a_removal(trigger: Trigger) -> None:
    """Die within the removal of an old checkpoint, some of its files gone."""
    original = shutil.rmtree

    def rmtree(path: Any, *args: Any, **kwargs: Any) -> None:
        if Path(path).name.startswith("step-") and trigger.due():
            for file in sorted(Path(path).iterdir())[:2]:
                file.unlink()
            trigger.fire()
        original(path, *args, **kwargs)

    shutil.rmtree = rmtree  # type: ignore[assignment]


def _update() -> Any:
    from peft_bituning.training.update import Update

    return Update


def _encoder() -> Any:
    from peft_bituning.catalog.encoder import HistoryEncoder

    return HistoryEncoder


def _module(name: str) -> Callable[[], Any]:
    def find() -> Any:
        import importlib

        return importlib.import_module(f"peft_bituning.{name}")

    return find


def _adamw() -> Any:
    import torch

    return torch.optim.AdamW


def _is_item(_self: Any, _histories: Any, kind: str = "user", *_: Any) -> bool:
    return kind == "item"


def _to_step(source: Any, target: Any) -> bool:
    return Path(target).name.startswith("step-")


def _to_marker(source: Any, target: Any) -> bool:
    return Path(target).name == "complete.json"


def _to_recommender(source: Any, target: Any) -> bool:
    return Path(target).name == "recommender"


def _is_marker(path: Path, *_: Any, **__: Any) -> bool:
    return path.name == "complete.json"


def _os() -> Any:
    return os


# Twelve updates, four an epoch: two epochs of stage 1 and one of stage 2; checkpoints every second update.
# name: where, the how-manieth time, which signal, updates that are left to the resumed run
POINTS: dict[str, tuple[Install, int, signal.Signals, int]] = {
    "recommender: second epoch": (around(_module("recommenders.fitting"), "validation_ndcg", "after"), 2, KILL, 12),
    "recommender: before its rename": (around(_os, "replace", "before", _to_recommender), 1, KILL, 12),
    "recommender: after its rename": (around(_os, "replace", "after", _to_recommender), 1, KILL, 12),
    "baselines: encoding items": (around(_encoder, "forward", "before", _is_item), 2, KILL, 12),
    "baselines: just written": (around(_module("training.report"), "write_whole", "after"), 1, KILL, 12),
    "update: the first": (around(_update, "run", "before"), 1, KILL, 12),
    "update: after the third": (around(_update, "run", "after"), 3, KILL, 10),
    "update: optimizer stepped, not counted": (around(_adamw, "step", "after"), 6, KILL, 10),
    "update: first of epoch 2": (around(_update, "run", "before"), 5, KILL, 8),
    "update: last of epoch 2": (around(_update, "run", "after"), 8, KILL, 6),
    "update: within stage 2": (around(_update, "run", "before"), 10, KILL, 4),
    "items: encoding for epoch 2": (around(_encoder, "forward", "after", _is_item), 7, KILL, 8),
    "validation: of epoch 1": (around(_module("training.stages"), "rank_users", "before"), 1, KILL, 10),
    "validation: of epoch 2, done": (around(_module("training.stages"), "rank_users", "after"), 2, KILL, 6),
    "validation: of stage 2": (around(_module("training.stages"), "rank_users", "before"), 3, KILL, 2),
    "checkpoint: first file half-written": (half_a_file, 1, KILL, 12),
    "checkpoint: later file half-written": (half_a_file, 9, KILL, 8),
    "checkpoint: written, first not renamed": (around(_os, "replace", "before", _to_step), 1, KILL, 12),
    "checkpoint: written, not renamed": (around(_os, "replace", "before", _to_step), 4, KILL, 6),
    "checkpoint: renamed, first not marked": (around(_os, "replace", "after", _to_step), 1, KILL, 12),
    "checkpoint: renamed, not marked": (around(_os, "replace", "before", _to_marker), 5, KILL, 4),
    "checkpoint: marked, not rotated": (around(_os, "replace", "after", _to_marker), 6, KILL, 2),
    "checkpoint: between the stages": (around(_os, "replace", "before", _to_step), 5, KILL, 4),
    "rotation: marker gone": (around(lambda: Path, "unlink", "after", _is_marker), 1, KILL, 8),
    "rotation: half removed": (half_a_removal, 2, KILL, 6),
    "test: scoring": (around(_module("training.report"), "rank_users", "before"), 4, KILL, 0),
    "end: saving the folder": (around(_module("serving.saved_recommender"), "write_folder", "before"), 1, KILL, 0),
    "end: results written": (around(_module("training.fit"), "write_whole", "after"), 1, KILL, 0),
    "Ctrl-C: within an update": (around(_update, "run", "before"), 7, INTERRUPT, 6),
    "Ctrl-C: within a checkpoint": (half_a_file, 6, INTERRUPT, 10),
    "Ctrl-C: while encoding items": (around(_encoder, "forward", "before", _is_item), 8, INTERRUPT, 8),
}


def run(folder: Path, base_model: Path, resume: bool) -> dict[str, Any]:
    """Train in this process; return what must not depend on kills, and how many updates were made."""
    import torch

    from peft_bituning import BiTuningConfig
    from peft_bituning.data import Interactions, ItemCatalog
    from peft_bituning.training import LaserArguments, fit

    made = 0
    original = _update().run

    def counted(*args: Any) -> Any:
        nonlocal made
        made += 1
        return original(*args)

    _update().run = counted
    catalog = ItemCatalog.from_records({"item_id": f"i{n}", "title": f"thing {n} of {n * n}"} for n in range(10))
    histories = tuple(tuple((user * 3 + step) % 10 for step in range(5)) for user in range(13))
    data = Interactions(catalog, tuple(f"u{user}" for user in range(13)), histories)
    config = BiTuningConfig(
        num_virtual_tokens=2,
        num_experts=2,
        encoder_hidden_size=16,
        encoder_num_layers=2,
        encoder_num_attention_heads=2,
        encoder_dropout=0.2,
        collaborative_dropout=0.3,
        center_embeddings=True,
    )
    arguments = LaserArguments.paper(
        str(folder),
        stage1_epochs=2,
        stage2_epochs=1,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=5,
        learning_rate=1e-2,
        stage2_learning_rate=None,
        cuts="last_cut",
        template="no_instruction",
        id_recommender="sasrec",
        id_recommender_epochs=2,
        logging_steps=1,
        save_steps=2,
        save_total_limit=1,
        resume=resume,
        disable_tqdm=True,
    )
    recommender = fit(data, base_model=base_model, config=config, arguments=arguments)
    results = json.loads((folder / "results.json").read_text())
    for record in results["epochs"]:
        del record["seconds"]
    return {
        "updates": made,
        "log_history": results["log_history"],
        "epochs": results["epochs"],
        "rows": results["rows"],
        "table": recommender.table.embeddings.flatten().tolist(),
        "random": torch.rand(1).item(),
        "left": sorted(path.name for path in folder.iterdir() if path.name in ("checkpoints", "baselines.json")),
    }


def fork(action: Callable[[], Any], wait: bool = True) -> int:
    """Run an action in a child; return its wait status, or without waiting its number."""
    child = os.fork()
    if child == 0:
        code = 1
        # A process started in the background inherits an ignored Ctrl-C.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            action()
            code = 0
        except KeyboardInterrupt:
            code = 130
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1] if wait else child


def main(base_model: Path, work: Path) -> None:
    """Run the undisturbed run, then every point."""
    import torch

    torch.set_num_threads(1)
    sys.modules["matplotlib"] = None  # type: ignore[assignment]  # the picture is not at stake and slow
    import peft_bituning.training  # noqa: F401

    def train(name: str, resume: bool, point: str | None = None) -> int:
        def action() -> None:
            if point is not None:
                install, n, number, _ = POINTS[point]
                install(Trigger(n, number))
            found = run(work / name, base_model, resume)
            (work / f"{name}.json").write_text(json.dumps(found))

        return fork(action)

    def visit(worker: int) -> None:
        outcomes: dict[str, Any] = {}
        for number, point in list(enumerate(POINTS))[worker::WORKERS]:
            name = f"point-{number}"
            first = train(name, resume=False, point=point)
            second = train(name, resume=True)
            outcomes[point] = {
                "signal": os.WTERMSIG(first) if os.WIFSIGNALED(first) else None,
                "code": os.WEXITSTATUS(first) if os.WIFEXITED(first) else None,
                "resumed": second,
                "file": f"{name}.json",
            }
            shutil.rmtree(work / name)
        (work / f"outcomes-{worker}.json").write_text(json.dumps(outcomes))

    if train("undisturbed", resume=False) != 0:
        sys.exit("the undisturbed run failed")
    workers = [fork(lambda worker=worker: visit(worker), wait=False) for worker in range(WORKERS)]
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) for worker in workers))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
