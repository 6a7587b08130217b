"""One method, one seed, one split: what goes into a cell of a comparison, and what comes out."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from peft_bituning.base_models import BaseModel
from peft_bituning.data import Interactions, LeaveOneOut
from peft_bituning.errors import ConfigurationError
from peft_bituning.evaluation import RankingReport
from peft_bituning.training.arguments import LaserArguments

from .kept_weights import KeptWeights

ReportT = TypeVar("ReportT")


@dataclass(frozen=True)
class Trial:
    """What a method is given.

    Args:
        method: its name.
        settings: its own settings, in place of its defaults.
        data: the histories.
        split: who is trained, validated and tested on what; its `training_users` may be few, or nobody.
        load_base: loads the language model; called by the methods that need one.
        arguments: the run's settings; `output_dir` is the trial's folder, `seed` its seed.
        shared: a folder for what several trials use: frozen recommenders, states of the items' texts.
        device: where to train.
        start: the weights of another trial to start from; None starts anew.
        keeps_weights: return the trained weights, for other trials to start from.
    """

    method: str
    settings: dict[str, Any]
    data: Interactions
    split: LeaveOneOut
    load_base: Callable[[], BaseModel]
    arguments: LaserArguments
    shared: Path
    device: torch.device
    start: KeptWeights | None = None
    keeps_weights: bool = False

    @property
    def is_trained(self) -> bool:
        """Whether there is anybody to train on."""
        return self.split.training_users is None or bool(self.split.training_users)

    @property
    def drawn(self) -> str | None:
        """A hash of the users that are trained on; None where that is all of them."""
        users = self.split.training_users
        return None if users is None else hashlib.sha256(json.dumps(sorted(users)).encode()).hexdigest()[:12]

    @property
    def folder(self) -> Path:
        """The trial's own folder."""
        return Path(self.arguments.output_dir)

    @property
    def num_items(self) -> int:
        """I."""
        return len(self.data.items)

    def only(self, *names: str) -> dict[str, Any]:
        """Return the settings, all of which must be known.

        Args:
            names: those that the method knows.

        Raises:
            ConfigurationError: another one is among them.
        """
        unknown = sorted(set(self.settings) - set(names))
        if unknown:
            raise ConfigurationError(
                f"settings of {self.method} must be among {', '.join(names) or '(none)'}, got {', '.join(unknown)}"
            )
        return dict(self.settings)


@dataclass(frozen=True)
class TrialResult(Generic[ReportT]):
    """What a method gives.

    Args:
        report: every test user's rank, or answer, in the split's order.
        valid: validation metrics of the weights that were chosen; None where nothing is.
        trainable_parameters: weights that are trained; 0 for methods that count.
        adapter_bytes: what has to be kept of them beside the language model.
        phases: `training`, `encoding` (the items) and `user`, or `answering`, each with `seconds` and
            `peak_memory_mb`, as `Meter` measures them; `encoding` has `items`, and `user` is one user, from history to
            ranked catalog.
        trained: `epochs`, `updates`, `rows` and `tokens` that training ran over; `tokens` None for methods that read
            no text.
        details: whatever else describes the run, as JSON values.
        weights: where the trial `keeps_weights`.
    """

    report: ReportT
    valid: dict[str, Any] | None
    trainable_parameters: int
    adapter_bytes: int
    phases: dict[str, dict[str, Any]]
    trained: dict[str, Any]
    details: dict[str, Any]
    weights: KeptWeights | None = None

    def to_values(self) -> dict[str, Any]:
        """Return what a cell keeps of it beside report and weights."""
        return {name: value for name, value in vars(self).items() if name not in ("report", "weights")}


Run = Callable[[Trial], TrialResult[RankingReport]]


@dataclass(frozen=True)
class Method:
    """A method of the comparison.

    Args:
        run: trains and evaluates it.
        is_ours: whether it is what others are the baselines of.
        is_random: whether a seed changes anything.
        uses_language_model: whether the language model has a part in it.
        arguments: the fields of `LaserArguments` that decide its result.
        takes_share: whether it trains on no more than the split's `training_users`.
        takes_start: whether it starts from another trial's weights, and then needs nobody to train on.
    """

    run: Run
    is_ours: bool = False
    is_random: bool = True
    uses_language_model: bool = False
    arguments: tuple[str, ...] = ()
    takes_share: bool = False
    takes_start: bool = False


METHODS: dict[str, Method] = {}


def register_method(name: str, **properties: Any) -> Callable[[Run], Run]:
    """Make a function from a trial to its result a method of the comparison.

    Args:
        name: as configurations spell it.
        properties: the other fields of `Method`.

    Returns:
        The decorator, which leaves the function as it is.
    """

    def register(run: Run) -> Run:
        METHODS[name] = Method(run, **properties)
        return run

    return register
