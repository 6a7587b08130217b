"""The folder of a run: whether one is there, and whether it is the one that is asked for."""

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast

from accelerate import Accelerator
from peft import PeftConfig, PeftModel

from ..artifacts import differences, to_json
from ..base_models import BaseModel
from ..catalog.encoder import HistoryEncoder
from ..data import Interactions, PromptTemplate
from ..errors import CheckpointError, ConfigurationError
from ..recommenders import IDRecommender
from ..tuners.bituning import BiTuningConfig
from ..tuners.rows.backbone import token_width
from .arguments import RENAMED, LaserArguments
from .checkpoint import CheckpointStore

logger = logging.getLogger(__name__)

RESULTS_FILE = "results.json"
CHECKPOINTS = "checkpoints"


class RunFolder:
    """The `output_dir` of a run, and what the run's parts took.

    Args:
        accelerator: the main process writes, the others wait.
        arguments: the run's settings.
    """

    def __init__(self, accelerator: Accelerator, arguments: LaserArguments) -> None:
        self.accelerator = accelerator
        self.arguments = arguments
        self.path = Path(arguments.output_dir)
        self.store = CheckpointStore(self.path / CHECKPOINTS, arguments.save_total_limit)
        self.started = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Measure the seconds of a part of the run."""
        start = time.perf_counter()
        yield
        self.seconds[part] = time.perf_counter() - start

    @property
    def rejects(self) -> Path | None:
        """Where the main process writes rows of tables that could not be read."""
        return self.path / "rejects.jsonl" if self.accelerator.is_main_process else None

    @property
    def is_finished(self) -> bool:
        """Whether it holds a run that came to its end."""
        return (self.path / RESULTS_FILE).is_file() and not self.store.complete()

    def prepare(self) -> None:
        """Make the folder.

        Raises:
            ConfigurationError: it holds a run that is neither to go on nor to be dropped.
        """
        if self.accelerator.is_main_process:
            self.path.mkdir(parents=True, exist_ok=True)
        found = "an unfinished" if self.store.complete() else "a finished" if self.is_finished else None
        self.accelerator.wait_for_everyone()
        if found and not self.arguments.resume:
            if not self.arguments.overwrite_output_dir:
                raise ConfigurationError(
                    f"output_dir {self.path} holds {found} run; {'go on with' if 'un' in found else 'load'} it by "
                    "--resume, drop it by --overwrite_output_dir, or choose another folder"
                )
            if self.accelerator.is_main_process:  # first the results, or a kill would leave them to be taken for ours
                (self.path / RESULTS_FILE).unlink(missing_ok=True)
                self.store.clear()
        if self.arguments.log_with:
            self.accelerator.init_trackers("peft_bituning", config=_flat(self.arguments.trajectory()))
        self.accelerator.wait_for_everyone()

    def check_finished(
        self,
        data: Interactions,
        base: BaseModel,
        config: BiTuningConfig,
        id_recommender: IDRecommender | None = None,
        template: PromptTemplate | None = None,
    ) -> None:
        """Hold a finished run against what is asked for; settings that it did not know yet are free.

        Raises:
            CheckpointError: its settings, its data or its language model are others, or cannot be read.
        """
        try:
            results = dict(json.loads((self.path / RESULTS_FILE).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"{RESULTS_FILE} of the finished run in {self.path} cannot be read ({error}); choose another folder, "
                "or train anew there with --overwrite_output_dir"
            ) from error
        config = replace(config)
        config.fill_sizes(token_width(base.model))
        inherited = {each.name for each in fields(PeftConfig)}
        given = {key: value for key, value in config.to_dict().items() if value is not None and key not in inherited}
        asked = to_json(
            {
                "settings": settings_of(self.arguments),
                "adapter": given,
                "parts": parts_of(data, id_recommender, template),
                "base_model": base.name,
                "data": data.content_hash,
            }
        )
        found = {name: results.get(name) or {} for name in asked}
        found["adapter"] = {**BiTuningConfig().to_dict(), **found["adapter"]}  # what a run made before a field had
        for group in ("settings", "adapter", "parts"):
            known = {RENAMED.get(name, name): value for name, value in found[group].items()}
            asked[group] = {name: value for name, value in asked[group].items() if name in known}
            found[group] = {name: known[name] for name in asked[group]}
        if different := differences(found, asked):
            raise CheckpointError(
                f"the finished run in {self.path} is another one: {'; '.join(different)}; choose another folder, or "
                "train anew there with --overwrite_output_dir"
            )
        logger.info("the run in %s is finished: nothing is trained", self.path)


def parts_of(
    data: Interactions, id_recommender: IDRecommender | None, template: PromptTemplate | None
) -> dict[str, Any]:
    """Name the parts that a run may be handed, by what is in them; those that are None are left out."""
    parts: dict[str, Any] = {}
    if id_recommender is not None:
        parts["id_recommender"] = id_recommender.content_hash()
    if template is not None:
        parts["template"] = replace(template, fields=template.fields_for(data.items)).to_dict()
    return parts


def settings_of(arguments: LaserArguments) -> dict[str, Any]:
    """Return what decided a run, with names instead of paths: nothing of this machine goes into what is shared."""
    names = {name: Path(getattr(arguments, name)).name for name in ("id_recommender", "template")}
    return {**arguments.trajectory(), **names}


def identity_of(
    data: Interactions, base: BaseModel, known: IDRecommender | None, encoder: HistoryEncoder
) -> dict[str, Any]:
    """Return what a resumed run must share, as JSON values."""
    return to_json(
        {
            "data": data.content_hash,
            "base_model": {"name": base.name, **base.fingerprint()},
            "id_recommender": None if known is None else known.content_hash(),
            "adapter": cast(PeftModel, encoder.model).peft_config["default"].to_dict(),
            "template": encoder.collator.prompts.template.to_dict(),
        }
    )


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value if isinstance(value, bool | int | float | str) else str(value) for key, value in values.items()}
