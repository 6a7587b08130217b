"""Training, validation and test samples: histories and the item that came next."""

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

from ..errors import ConfigurationError, DataError
from .interactions import Interactions

CutStrategy = Literal["every_cut", "random_cut", "last_cut"]
Split = Literal["valid", "test"]

_MIN_EVENTS = 3  # one to learn from, one to validate on, one to test on


class HistoryAndTarget(Protocol):
    """What ranking reads of a sample."""

    @property
    def history(self) -> Sequence[int]:
        """Catalog indices, oldest first."""

    @property
    def target(self) -> int:
        """Catalog index of the item that came next."""


@dataclass(frozen=True)
class Sample:
    """A history and the item that followed it."""

    user: int  # index of the user
    history: tuple[int, ...]  # catalog indices in time order, at least one
    target: int  # catalog index of the next item


class LeaveOneOut:
    """Leave-one-out split: the last item is tested, the last but one validated, the rest trains (paper 4.1.3).

    Users with fewer than three events train only and are counted in `users_not_evaluated`.

    Args:
        histories: Per user, catalog indices in time order.
        training_users: The users that train; None is all of them. Validated and tested are all, whoever trains.
        held_out_items: Items that nobody has bought before the test: their events are taken out of training and
            validation, and a user without another item before the test is not evaluated.
    """

    def __init__(
        self,
        histories: Sequence[Sequence[int]],
        training_users: Collection[int] | None = None,
        held_out_items: Collection[int] = (),
    ) -> None:
        self._histories = [tuple(int(item) for item in history) for history in histories]
        self.training_users = None if training_users is None else frozenset(training_users)
        self.held_out_items = frozenset(held_out_items)
        long_enough = [len(history) >= _MIN_EVENTS for history in self._histories]
        self._training = [
            self._known(history[:-2] if long_enough[user] else history) for user, history in enumerate(self._histories)
        ]
        self._evaluated = [user for user, training in enumerate(self._training) if training and long_enough[user]]
        if self.training_users is not None:
            self._training = [part if user in self.training_users else () for user, part in enumerate(self._training)]

    def _known(self, events: tuple[int, ...]) -> tuple[int, ...]:
        """Leave out the events of items that are held out."""
        return tuple(item for item in events if item not in self.held_out_items) if self.held_out_items else events

    @classmethod
    def of(cls, data: Interactions, hold_out_items: float = 0.0, seed: int = 0) -> "LeaveOneOut":
        """Split histories; a DataError says that there is nobody to train or to choose on, or nothing to rank.

        `hold_out_items` is the share of items to hold out, drawn with the seed.
        """
        if len(data.items) < 2:
            raise DataError(
                f"the catalog must have at least 2 items to rank, got {len(data.items)}; there is nothing to recommend"
            )
        if not 0 <= hold_out_items < 1:
            raise ConfigurationError(f"hold_out_items must be a share in [0, 1), got {hold_out_items!r}")
        order = list(range(len(data.items)))
        random.Random(f"held out/{seed}").shuffle(order)
        split = cls(data.histories, held_out_items=order[: round(hold_out_items * len(order))])
        lacking = None
        if not split.samples("valid"):
            lacking = "three events that training, validation and test need"
        elif not split.training_samples("last_cut"):
            lacking = "four events that a training row beside validation and test needs"
        if lacking:
            raise DataError(f"no user has the {lacking}; give longer histories")
        return split

    @property
    def users_not_evaluated(self) -> int:
        """Users with too few events for a validation and a test target."""
        return len(self._histories) - len(self._evaluated)

    def drawn(self, share: float, seed: int = 0) -> "LeaveOneOut":
        """Return this split with a share of the users to train on, of those with a training sample.

        A share is from 0, nobody, to 1, everybody; between them it is at least one user. Draws of one seed are nested:
        the users of a smaller share are among those of a larger one.
        """
        if not 0 <= share <= 1:
            raise ConfigurationError(f"share must be from 0 to 1, got {share!r}")
        if share == 1:
            return self
        users = [user for user, sequence in enumerate(self._training) if len(sequence) >= 2]
        random.Random(f"share/{seed}").shuffle(users)
        number = max(1, round(share * len(users))) if share else 0
        return LeaveOneOut(self._histories, users[:number], self.held_out_items)

    @property
    def train_sequences(self) -> list[list[int]]:
        """The training part of every user, aligned with the users; it may be empty."""
        return [list(part) for part in self._training]

    @property
    def known_sequences(self) -> list[list[int]]:
        """All that comes before the test item of every user; users who are not evaluated have their training part."""
        known = self.train_sequences
        for user in self._evaluated:
            known[user] = list(self._known(self._histories[user][:-1]))
        return known

    def training_samples(self, strategy: CutStrategy = "every_cut", seed: int = 0, epoch: int = 0) -> list[Sample]:
        """Return the shuffled training samples of one epoch; a ConfigurationError names an unknown strategy.

        Args:
            strategy: `every_cut`: one sample for every cut of a training part with an item before and one after;
                `random_cut`: one cut a user, drawn anew every epoch; `last_cut`: the last cut of every user.
            seed: Seed of the order and the cuts.
            epoch: Epochs differ in order, and under `random_cut` in cuts; the same epoch is always the same.
        """
        if strategy not in get_args(CutStrategy):
            raise ConfigurationError(f"strategy must be one of {', '.join(get_args(CutStrategy))}, got {strategy!r}.")
        generator = random.Random(f"samples/{seed}/{epoch}")
        samples: list[Sample] = []
        for user, sequence in enumerate(self._training):
            cuts: Sequence[int] = range(1, len(sequence))
            if strategy == "random_cut" and cuts:
                cuts = [generator.choice(cuts)]
            elif strategy == "last_cut":
                cuts = cuts[-1:]
            samples.extend(Sample(user, sequence[:cut], sequence[cut]) for cut in cuts)
        generator.shuffle(samples)
        return samples

    def samples(self, split: Split) -> list[Sample]:
        """Return one sample per evaluated user, in user order; a ConfigurationError names an unknown split.

        The history of `valid` is the training part, that of `test` includes the validation item; nobody is validated
        on an item that is held out.
        """
        if split not in ("valid", "test"):
            raise ConfigurationError(f"split must be 'valid' or 'test', got {split!r}.")
        place = -2 if split == "valid" else -1
        found = ((user, self._histories[user]) for user in self._evaluated)
        return [
            Sample(user, self._known(history[:place]), history[place])
            for user, history in found
            if split == "test" or history[place] not in self.held_out_items
        ]
