"""Train Laser on purchase histories: `accelerate launch examples/train_amazon.py --dataset ... --model ...`.

Without `--dataset` it runs the offline quickstart, `examples/configs/quickstart.yaml`. `--config FILE.yaml` takes
settings from a file; flags on the command line win over either. All work is done by `peft_bituning.training.fit`.
"""

import dataclasses
import logging
import sys
import typing
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from peft import PeftConfig
from transformers import HfArgumentParser

from peft_bituning import BiTuningConfig
from peft_bituning.base_models import load_base_model
from peft_bituning.data import SOURCE_FORMS, load_interactions
from peft_bituning.errors import BiTuningError, ConfigurationError
from peft_bituning.launch import launched_state, use_all_cores
from peft_bituning.serving.card import groups_table, results_table
from peft_bituning.training import LaserArguments, fit
from peft_bituning.training.arguments import RENAMED, RETIRED

DTYPES = ("float32", "bfloat16", "float16")
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
    model_dtype: str = field(default="float32", metadata={"help": f"Type of the frozen weights: {', '.join(DTYPES)}."})
    attn_implementation: str | None = field(default=None, metadata={"help": "sdpa, eager, flash_attention_2, ..."})

    def __post_init__(self) -> None:
        """Check the type's name."""
        if self.model_dtype not in DTYPES:
            raise ConfigurationError(f"model_dtype must be one of {', '.join(DTYPES)}, got {self.model_dtype!r}")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type as torch knows it."""
        return getattr(torch, self.model_dtype)


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

    Raises:
        ConfigurationError: an unknown argument or setting, or a value of the wrong type or out of range.
    """
    groups: list[Any] = [DataArguments, ModelArguments, AdapterArguments, LaserArguments]
    parser = Parser(groups, description=__doc__)
    _take_none(parser)
    argv = [f"--{_present_name(flag[2:])}" if flag.startswith("--") else flag for flag in argv]
    parser.add_argument("--config", help="A YAML file of settings; flags win over it.")
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        raise ConfigurationError(f"arguments must be known ones, got {' '.join(unknown)}; --help lists them")
    chooses_data = any(flag.partition("=")[0] == "--dataset" for flag in argv)
    config = known.config or (None if chooses_data else QUICKSTART)
    from_file = [] if config is None else _flags(Path(config), parser)
    *parsed, _ = parser.parse_args_into_dataclasses(from_file + argv)  # of a flag given twice the last one counts
    return tuple(parsed)


def _take_none(parser: HfArgumentParser) -> None:
    """Let `none` say of a setting that may be None that it is."""
    types = {name: kind for each in parser.dataclass_types for name, kind in typing.get_type_hints(each).items()}
    for action in parser._actions:
        if action.nargs is None and type(None) in typing.get_args(types.get(action.dest)):
            action.type = _Optional(action.type)


@dataclass(frozen=True)
class _Optional:
    """Reads `none` as None, and everything else as a type does."""

    read: Any

    def __call__(self, text: str) -> Any:
        """Return the value of a flag."""
        return None if text == "none" else self.read(text)


def _present_name(name: str) -> str:
    """Return what a setting, `name` or `name=value`, is called now; one that is gone is refused with the reason."""
    name, equals, value = name.partition("=")
    if name in RETIRED:
        raise ConfigurationError(f"{name} must be left out, it is no setting any more: {RETIRED[name]}")
    if name in RENAMED:
        warnings.warn(f"{name} is called {RENAMED[name]} now", FutureWarning, stacklevel=2)
    return f"{RENAMED.get(name, name)}{equals}{value}"


class Parser(HfArgumentParser):
    """Says what is wrong in one line, without the pages of usage."""

    def error(self, message: str) -> NoReturn:
        """Raise the error for `main` to print."""
        raise ConfigurationError(f"{message}; --help lists all arguments")


def _flags(path: Path, parser: HfArgumentParser) -> list[str]:
    """Turn the settings of a YAML file into flags; a setting without a value keeps its default."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigurationError(f"--config must be a readable YAML file, got {str(path)!r}: {reason}") from error
    if not isinstance(values, dict):
        raise ConfigurationError(f"{path.name} must hold lines of `name: value`, got {type(values).__name__}")
    values = {_present_name(str(name)): value for name, value in values.items()}
    known = {each.name for kind in parser.dataclass_types for each in dataclasses.fields(kind)}
    unknown = sorted(str(name) for name in set(values) - known)
    if unknown:
        raise ConfigurationError(
            f"{path.name} must hold known settings, got {', '.join(unknown)}; train_amazon.py --help lists them"
        )
    flags: list[str] = []
    for name, value in values.items():
        if value is not None:
            flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return flags


def main(argv: list[str]) -> None:
    """Run the whole job."""
    use_all_cores()
    data_arguments, model_arguments, adapter_arguments, arguments = parse(argv)
    is_main = launched_state().is_main_process
    logging.basicConfig(format="%(message)s", level=logging.INFO if is_main else logging.ERROR)
    for chatty in ("httpx", "accelerate", "datasets"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
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
        dtype=model_arguments.torch_dtype,
        revision=model_arguments.model_revision,
        attn_implementation=model_arguments.attn_implementation,
    )
    config = BiTuningConfig(**dataclasses.asdict(adapter_arguments))
    recommender = fit(interactions, base_model=base_model, config=config, arguments=arguments)
    if is_main:
        results = recommender.results
        print(results_table(results["rows"]), groups_table(results["rows"]), sep="\n\n")
        if results.get("language_model"):  # a finished run of an earlier version has none
            print(f"\n{results['language_model']['verdict']}")
        print(f"saved to {output}: results.json, training_curves.png, and the adapter for LaserRecommender")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except BiTuningError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        print("stopped; the same command with --resume goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
