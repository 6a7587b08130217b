"""Train Laser on purchase histories: `accelerate launch examples/train_amazon.py --dataset ... --model ...`.

Without arguments it runs the offline quickstart, `examples/configs/quickstart.yaml`. `--config FILE.yaml` takes
settings from a file; flags on the command line win over it. All work is done by `peft_bituning.training.fit`.
"""

import dataclasses
import logging
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from peft import PeftConfig
from transformers import HfArgumentParser

from peft_bituning import BiTuningConfig
from peft_bituning.base_models import load_base_model
from peft_bituning.data import SOURCE_FORMS, load_interactions
from peft_bituning.errors import BiTuningError, ConfigurationError
from peft_bituning.serving.results_table import results_table
from peft_bituning.training import LaserArguments, fit

QUICKSTART = Path(__file__).parent / "configs" / "quickstart.yaml"


@dataclass
class DataArguments:
    """Which histories to train on."""

    dataset: str = field(
        default="ml-100k", metadata={"help": "; ".join(f"{form}: {text}" for form, text in SOURCE_FORMS.items())}
    )
    max_users: int | None = field(default=None, metadata={"help": "A seeded cut of so many users; None is all."})
    max_rejected: float = field(default=0.05, metadata={"help": "Share of bad rows above which reading stops."})


@dataclass
class ModelArguments:
    """Which language model to tune."""

    model: str = field(default="smollm2-135m", metadata={"help": "Hub id, local folder, or alias."})
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub model."})
    model_dtype: str = field(default="float32", metadata={"help": "Type of the frozen weights: float32, bfloat16, ..."})
    attn_implementation: str | None = field(default=None, metadata={"help": "sdpa, eager, flash_attention_2, ..."})


AdapterArguments = dataclasses.make_dataclass(
    "AdapterArguments",
    [
        (each.name, each.type, field(default=each.default, metadata=dict(each.metadata)))
        for each in dataclasses.fields(BiTuningConfig)
        if each.name not in {base.name for base in dataclasses.fields(PeftConfig)}
    ],
)
AdapterArguments.__doc__ = "The adapter: the fields of BiTuningConfig."


def parse(argv: list[str]) -> tuple[Any, ...]:
    """Merge a YAML file and flags into the four groups of arguments; flags win.

    Args:
        argv: the command line without the program's name.

    Returns:
        Data, model, adapter and training arguments.
    """
    config = str(QUICKSTART) if not argv else None
    flags = list(argv)
    if "--config" in flags:
        place = flags.index("--config")
        if place + 1 >= len(flags):
            raise ConfigurationError("--config must be followed by a YAML file, got nothing")
        config = flags[place + 1]
        del flags[place : place + 2]
    groups: list[Any] = [DataArguments, ModelArguments, AdapterArguments, LaserArguments]
    parser = HfArgumentParser(groups, description=__doc__)
    if config is None:
        return parser.parse_args_into_dataclasses(flags)
    try:
        values = yaml.safe_load(Path(config).read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        raise ConfigurationError(f"--config must be a readable YAML file, got {config!r}: {error}") from error
    known = {each.name for kind in parser.dataclass_types for each in dataclasses.fields(kind)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ConfigurationError(f"{Path(config).name} must hold known settings, got {', '.join(unknown)}")
    given = {flag.split("=")[0].lstrip("-").replace("-", "_") for flag in flags if flag.startswith("--")}
    from_file: list[str] = []
    for name, value in values.items():
        if value is not None and name not in given:
            from_file += [f"--{name}", *([str(each) for each in value] if isinstance(value, list) else [str(value)])]
    return parser.parse_args_into_dataclasses(from_file + flags)


def use_all_cores() -> None:
    """Take every core of this process's share: launchers set one thread on CPUs."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(max(1, available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def main(argv: list[str]) -> None:
    """Run the whole job."""
    use_all_cores()
    data_arguments, model_arguments, adapter_arguments, arguments = parse(argv)
    logging.basicConfig(format="%(message)s", level=logging.INFO if PartialState().is_main_process else logging.ERROR)
    for chatty in ("httpx", "accelerate", "datasets"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    is_main = PartialState().is_main_process
    output = Path(arguments.output_dir)
    if is_main:
        output.mkdir(parents=True, exist_ok=True)
    interactions = load_interactions(
        data_arguments.dataset,
        rejects_path=output / "rejects.jsonl" if is_main else None,
        max_rejected=data_arguments.max_rejected,
        progress=is_main and not arguments.disable_tqdm,
    )
    if data_arguments.max_users is not None and data_arguments.max_users < len(interactions):
        interactions = interactions.sample_users(data_arguments.max_users, arguments.seed)
    base_model = load_base_model(
        model_arguments.model,
        dtype=getattr(torch, model_arguments.model_dtype),
        revision=model_arguments.model_revision,
        attn_implementation=model_arguments.attn_implementation,
    )
    config = BiTuningConfig(**dataclasses.asdict(adapter_arguments))
    recommender = fit(interactions, base_model=base_model, config=config, arguments=arguments)
    if is_main:
        print(results_table(recommender.settings.results["rows"]))
        print(f"saved to {output}: results.json, training_curves.png, and the adapter for LaserRecommender")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except BiTuningError as error:
        sys.exit(f"{type(error).__name__}: {error}")
