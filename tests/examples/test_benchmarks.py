"""The speed benchmarks start and print their tables."""

import subprocess
import sys
from pathlib import Path

SPEED = Path(__file__).parents[2] / "examples" / "benchmarks" / "speed"


def test_loss() -> None:
    command = [sys.executable, str(SPEED), "loss", "--rounds", "1", "--table_items", "50", "20000"]
    out = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True).stdout
    assert out.startswith("float32 matmul on one thread: ")
    assert "### loss: 8 users, 50 items" in out and "### loss: 8 users, 20,000 items" in out
    rows = [line for line in out.splitlines() if line.startswith("| table normalised once, chunks of 8,192")]
    assert len(rows) == 2
    errors = [float(row.split("gradient ")[1].split()[0]) for row in rows]
    assert all(error < 1e-4 for error in errors)


def test_rank() -> None:
    command = [sys.executable, str(SPEED), "rank", "--rounds", "1", "--table_items", "30000"]
    out = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True).stdout
    rows = [line for line in out.splitlines() if line.startswith("| ours: chunks, running top-k")]
    assert len(rows) == 2 and all("recall 1.000" in row for row in rows)


def test_an_unknown_one_is_refused() -> None:
    done = subprocess.run([sys.executable, str(SPEED), "lose"], capture_output=True, text=True, timeout=200)
    assert done.returncode == 2
    assert "choose from train_step, encode, loss, rank, hybrid, memory, got lose" in done.stderr


def test_an_attribute_that_no_item_has_is_refused(tmp_path: Path) -> None:
    (tmp_path / "items.jsonl").write_text('{"item_id": "a", "title": "A lamp", "brand": "Acme"}\n')
    (tmp_path / "interactions.csv").write_text("user_id,item_id,timestamp\nu,a,1\n")
    command = [sys.executable, str(SPEED), "encode", "--dataset", f"folder:{tmp_path}", "--attributes", "colour"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2
    assert "attributes must be columns of the catalog (brand) or none, got colour" in done.stderr
