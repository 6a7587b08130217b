"""A catalog whose texts tell what comes next."""

import random

import pytest

from peft_bituning.data import Interactions, ItemCatalog

KINDS = ("lamp", "kettle", "rope", "glove", "ladder")
LOOKS = ("Brass", "Steel", "Copper", "Blue", "Red", "Green")
#: Items that occur as the last ones of the first 15 users and nowhere else; their words occur in other items.
COLD = {"lamp": "Brass", "kettle": "Steel", "rope": "Copper", "glove": "Blue", "ladder": "Red"}


@pytest.fixture(scope="session")
def worded_data() -> Interactions:
    """Return 60 users: after a lamp comes a kettle, then a rope, a glove, a ladder, whatever they look like."""
    catalog = ItemCatalog.from_records(
        {"item_id": f"{look}-{kind}", "title": f"{look} {kind}"} for look in LOOKS for kind in KINDS
    )
    generator = random.Random(0)
    histories = []
    for user in range(60):
        kinds = [KINDS[(user + step) % len(KINDS)] for step in range(7)]
        looks = [generator.choice([look for look in LOOKS if look != COLD[kind]]) for kind in kinds]
        if user < 15:
            looks[-1] = COLD[kinds[-1]]
        ids = [f"{look}-{kind}" for look, kind in zip(looks, kinds, strict=True)]
        histories.append(tuple(catalog.indices_of(ids)))
    return Interactions(catalog, tuple(f"user {user}" for user in range(60)), tuple(histories), source="a ring")
