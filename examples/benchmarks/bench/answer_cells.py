"""The cells of candidates.py, method x seed: what decides them, and how one is run."""

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from peft_bituning.base_models import BaseModel, load_base_model
from peft_bituning.data import Interactions, LeaveOneOut, load_interactions
from peft_bituning.errors import ConfigurationError
from peft_bituning.training import LaserArguments

from .cells import Cell, Result, deciding, place_cell
from .comparison import SHARED
from .methods import Trial
from .methods.answering import ANSWERING, run_answers
from .methods.llamarec import ARGUMENTS

DTYPES = ("float32", "bfloat16", "float16")
OF_THE_RECOMMENDER = ("id_recommender", "id_recommender_epochs")


@dataclass
class Options:
    """What is asked of which methods."""

    dataset: str = field(default="ml-100k", metadata={"help": "ml-100k, folder:PATH, atomic:PATH, amazon2018:..."})
    max_users: int | None = field(default=None, metadata={"help": "A seeded cut of so many users; None is all."})
    max_test_users: int | None = field(default=100, metadata={"help": "The first so many are asked; 0 is all."})
    model: str = field(default="smollm2-135m", metadata={"help": "Hub id, local folder, or alias."})
    model_dtype: str = field(default="float32", metadata={"help": f"Type of the frozen weights: {', '.join(DTYPES)}."})
    attn_implementation: str | None = field(default=None, metadata={"help": "sdpa, eager, flash_attention_2, ..."})
    methods: list[str] = field(default_factory=lambda: list(ANSWERING), metadata={"help": ", ".join(ANSWERING)})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "One run per method and seed."})
    num_candidates: int = field(default=20, metadata={"help": "Candidates per prompt, the target among them."})
    candidate_seed: int = field(default=0, metadata={"help": "Decides the candidates of the users asked."})

    def __post_init__(self) -> None:
        """Check what argparse does not."""
        unknown = sorted(set(self.methods) - set(ANSWERING))
        if unknown or not self.methods:
            raise ConfigurationError(
                f"methods must be among {', '.join(ANSWERING)}, got {', '.join(unknown) or 'none'}"
            )
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ConfigurationError(f"seeds must be different numbers, at least one, got {self.seeds!r}")
        if self.model_dtype not in DTYPES:
            raise ConfigurationError(f"model_dtype must be one of {', '.join(DTYPES)}, got {self.model_dtype!r}")

    def load_data(self) -> Interactions:
        """Read the histories."""
        data = load_interactions(self.dataset)
        return data if self.max_users is None else data.sample_users(self.max_users, 0)

    def load_base(self) -> BaseModel:
        """Load the language model."""
        dtype: torch.dtype = getattr(torch, self.model_dtype)
        return load_base_model(self.model, dtype, attn_implementation=self.attn_implementation)


def make_cells(options: Options, arguments: LaserArguments, data: Interactions) -> list[Cell]:
    """Return every cell, seed by seed, in the `output_dir` of the arguments; the hash of the data is part of each."""
    model = Path(options.model)
    digest = data.content_hash
    cells = []
    for seed in options.seeds:
        for method in options.methods:
            ignored = OF_THE_RECOMMENDER if method == "lora" else ()
            identity = {
                "method": method,
                "seed": seed,
                "training": deciding(arguments, tuple(name for name in ARGUMENTS if name not in ignored)),
                "candidates": [options.num_candidates, options.candidate_seed, options.max_test_users],
                "data": digest,
                "model": [
                    model.name if model.is_dir() else options.model,
                    options.model_dtype,
                    options.attn_implementation,
                ],
            }
            cells.append(place_cell(arguments.output_dir, method, seed, identity))
    return cells


def fill_answers(cell: Cell, options: Options, arguments: LaserArguments) -> None:
    """Train and ask one method with one seed in this process, from its checkpoint on, and write its result."""
    data, shared = options.load_data(), Path(arguments.output_dir) / SHARED
    shared.mkdir(parents=True, exist_ok=True)
    trial = Trial(
        cell.method,
        {},
        data,
        LeaveOneOut(data.histories),
        options.load_base,
        replace(arguments, output_dir=str(cell.folder), seed=cell.seed, resume=True),
        shared,
        torch.device("cuda" if torch.cuda.is_available() else "cpu"),
    )
    cell.fill(partial(_run, trial, options))


def _run(trial: Trial, options: Options) -> Result:
    result = run_answers(trial, options.num_candidates, options.candidate_seed, options.max_test_users or None)
    return {"test": result.report.metrics(), **result.to_values(), "answers": result.report.to_list()}, {}
