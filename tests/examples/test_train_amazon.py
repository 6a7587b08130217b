"""The main job: its arguments, and the script itself as people run it."""

import importlib.util
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from matplotlib import image

from peft_bituning.errors import ConfigurationError

pytestmark = pytest.mark.timeout(900)  # whole trainings in processes of their own

SCRIPT = Path(__file__).parents[2] / "examples" / "train_amazon.py"
QUICKSTART = yaml.safe_load((SCRIPT.parent / "configs" / "quickstart.yaml").read_text())


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_amazon", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_amazon"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def config(tmp_path: Path) -> Callable[[str], str]:
    def write(text: str) -> str:
        path = tmp_path / "settings.yaml"
        path.write_text(text)
        return str(path)

    return write


# ---------------------------------------------------------------------- arguments


@pytest.mark.parametrize("argv", [[], ["--resume"]])
def test_quickstart_without_a_data_set(script: ModuleType, argv: list[str]) -> None:
    found = {key: value for group in script.parse(argv) for key, value in vars(group).items()}
    assert {key: found[key] for key in QUICKSTART} == QUICKSTART
    assert found["max_users"] >= 300 and found["dataset"] == "ml-100k" and found["model"] == "smollm2-135m"
    assert found["resume"] == (argv == ["--resume"])


def test_data_set_without_a_file_takes_the_defaults(script: ModuleType) -> None:
    data, _, adapter, arguments = script.parse(["--dataset", "folder:x"])
    assert (data.dataset, data.max_users, adapter.encoder_hidden_size) == ("folder:x", None, None)
    assert arguments == script.LaserArguments()
    assert script.parse(["--dataset=folder:x"])[0] == data


def test_flags_win_over_the_file(script: ModuleType, config: Callable[[str], str]) -> None:
    path = config("seed: 1\nmax_users: 7\nlearning_rate: 1e-3\nmodules_to_save: [a, b]\nfast_cpu_matmul: true\n")
    for place in (["--config", path], [f"--config={path}"]):
        data, _, adapter, arguments = script.parse([*place, "--seed", "2", "--fast_cpu_matmul", "false"])
        assert (arguments.seed, arguments.learning_rate, arguments.fast_cpu_matmul) == (2, 1e-3, False)
        assert (data.max_users, adapter.modules_to_save) == (7, ["a", "b"])
    assert script.parse(["--seed=5", "--config", path])[3].seed == 5
    assert script.parse(["--config", path, "--modules-to-save", "c"])[2].modules_to_save == ["c"]


def test_booleans_and_nothing(script: ModuleType, config: Callable[[str], str]) -> None:
    path = config("init_weights: false\ndisable_tqdm: true\nmax_history: null\nstage2_learning_rate:\n")
    _, _, adapter, arguments = script.parse(["--config", path, "--resume"])
    assert (adapter.init_weights, arguments.disable_tqdm, arguments.resume) == (False, True, True)
    assert (arguments.max_history, arguments.stage2_learning_rate) == (2, 3e-4)
    assert script.parse(["--config", path, "--max_history", "none"])[3].max_history is None
    assert script.parse(["--config", config("max_history: none\n")])[3].max_history is None
    assert script.parse(["--config", path, "--init_weights"])[2].init_weights is True
    assert script.parse(["--config", config("")])[3] == script.LaserArguments()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sed: 1\nnothing: 2\n", "settings.yaml must hold known settings, got nothing, sed"),
        ("- seed\n", "settings.yaml must hold lines of `name: value`, got list"),
        ("seed: [\n", "--config must be a readable YAML file"),
        ("seed: many\n", "argument --seed.*: invalid int value: 'many'"),
        ("stage1_epochs: -1\n", "stage1_epochs must be an integer >= 0, got -1"),
        ("model_dtype: int3\n", "model_dtype must be one of float32, bfloat16, float16, got 'int3'"),
    ],
)
def test_wrong_file(script: ModuleType, config: Callable[[str], str], text: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        script.parse(["--config", config(text)])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--sed", "3"], "arguments must be known ones, got --sed 3"),
        (["--seed"], "argument --seed.*: expected one argument"),
        (["--config"], "argument --config: expected one argument"),
        (["--config", "none.yaml"], "--config must be a readable YAML file, got 'none.yaml'"),
        (["--resume", "--overwrite_output_dir"], "resume and overwrite_output_dir must not both be set"),
    ],
)
def test_wrong_flags(script: ModuleType, argv: list[str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        script.parse(argv)
    assert "\n" not in str(caught.value)


def test_names_of_before(script: ModuleType, config: Callable[[str], str]) -> None:
    path = config("recommender: bert4rec\nrecommender_epochs: 7\n")
    for argv in (["--config", path], ["--dataset", "x", "--recommender=bert4rec", "--recommender_epochs", "7"]):
        with pytest.warns(FutureWarning, match="recommender is called id_recommender now"):
            arguments = script.parse(argv)[3]
        assert (arguments.id_recommender, arguments.id_recommender_epochs) == ("bert4rec", 7)
    for argv in (["--config", config("group_cuts: true\n")], ["--dataset", "x", "--group_cuts", "true"]):
        with pytest.raises(ConfigurationError, match="group_cuts must be left out, it is no setting any more: it foll"):
            script.parse(argv)


def test_adapter_arguments_are_those_of_the_config(script: ModuleType) -> None:
    adapter = script.parse(["--dataset", "x", "--num_virtual_tokens", "5"])[2]
    config = script.BiTuningConfig(**vars(adapter))
    assert config.num_virtual_tokens == 5 and config.prefix_encoder == "mformer"


# ---------------------------------------------------------------------- the script


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a data set in the package's own form."""
    folder = tmp_path_factory.mktemp("shop")
    items = [{"item_id": f"{n:03d}", "title": f"thing {n}", "brand": "Acme"} for n in range(8)]
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    lines = ["user_id,item_id,timestamp"]
    lines += [f"u{user},{(user + step) % 8:03d},{1_600_000_000 + step}" for user in range(12) for step in range(5)]
    (folder / "interactions.csv").write_text("\n".join(lines) + "\n")
    return folder


def _run(*argv: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *argv], cwd=cwd, env=environment, capture_output=True, text=True, timeout=840
    )


def test_main_job(shop: Path, tiny_base_folder: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "num_virtual_tokens": 2,
        "num_experts": 2,
        "encoder_hidden_size": 16,
        "encoder_num_layers": 2,
        "encoder_num_attention_heads": 2,
        "id_recommender": "sasrec",
        "id_recommender_epochs": 1,
        "stage1_epochs": 1,
        "stage2_epochs": 1,
        "cuts": "last_cut",
        "template": "no_instruction",
        "logging_steps": 1,
    }
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(settings))
    done = _run(
        "--config", "settings.yaml", "--dataset", f"folder:{shop}", "--model", str(tiny_base_folder),
        "--max_users", "10", "--output_dir", "out", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    out = tmp_path / "out"
    results = json.loads((out / "results.json").read_text())
    assert results["dataset"]["users"] == 10
    table = [line for line in done.stdout.splitlines() if line.startswith("|")]
    for row in results["rows"]:
        assert sum(f"{row['name']} |" in line for line in table) == 2  # all users, and groups of them
    assert len(results["rows"]) == 10 and "R@10, kept" in table[0]
    assert results["language_model"]["verdict"] in done.stdout
    assert image.imread(out / "training_curves.png").ndim == 3
    assert (out / "adapter_model.safetensors").is_file() and (out / "manifest.json").is_file()
    assert "stage 1 epoch 1" in done.stderr  # bars and notes do not mix with the table
    assert str(tmp_path) not in (out / "adapter_config.json").read_text() + (out / "README.md").read_text()


def test_wrong_argument_is_one_line(tmp_path: Path) -> None:
    done = _run("--dataset", "folder:/nowhere/at/all", "--output_dir", "out", cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    lines = [line for line in done.stderr.strip().splitlines() if "gemm_4bit" not in line]  # bitsandbytes says so
    assert len(lines) == 1
    assert lines[0].startswith("DataError: ") and "/nowhere/at/all" in lines[0]


def test_help(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        script.parse(["--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    for name in ("--dataset", "--model", "--config", "--num_virtual_tokens", "--stage1_epochs", "--resume"):
        assert name in shown


@pytest.mark.parametrize("argv", [["--sed", "3"], ["--stage1_epochs", "-1"], ["--dataset", "nothing-like-this"]])
def test_errors_end_the_script_with_one_line(argv: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *argv])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    message = caught.value.code  # Python prints a text and exits with 1
    assert isinstance(message, str) and "\n" not in message
    assert message.startswith(("ConfigurationError: ", "DataError: ")) and argv[1] in message
