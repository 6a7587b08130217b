"""States of all items: shapes, opening, memory."""

from pathlib import Path

import pytest
import torch

from peft_bituning.block_file import BlockFile
from peft_bituning.errors import ArtifactError, InputError
from peft_bituning.ssna import ItemStates


def test_sizes_and_their_errors():
    states = ItemStates(torch.zeros(4, 2, 3), {})
    assert (len(states), states.num_layers, states.width) == (4, 2, 3)
    with pytest.raises(InputError, match=r"states must have shape \[items, layers, width\], got \[4, 3\]"):
        ItemStates(torch.zeros(4, 3), {})
    with pytest.raises(InputError, match=r"got \[0, 2, 3\]"):
        ItemStates(torch.zeros(0, 2, 3), {})
    with pytest.raises(InputError, match="states must be of a float type, got torch.int64"):
        ItemStates(torch.zeros(4, 2, 3, dtype=torch.long), {})


def test_open_gives_what_was_finished_and_refuses_the_rest(tmp_path):
    with pytest.raises(ArtifactError, match="holds no cached states; make them with cache_item_states"):
        ItemStates.open(tmp_path)
    file = BlockFile(tmp_path, "states", "states", {"pooling": "last"}, (5, 1, 2), "float32", 2)
    file.create()
    values = torch.randn(5, 1, 2)
    file.write(0, values[:2])
    file.write(2, values[4:])
    with pytest.raises(
        ArtifactError, match=r"1 of 3 blocks .* are unfinished or damaged, first \[1\]; call cache_item"
    ):
        ItemStates.open(tmp_path)
    file.write(1, values[2:4])
    states = ItemStates.open(tmp_path)
    assert torch.equal(states.values, values) and states.origin == {"pooling": "last"}
    data = bytearray((tmp_path / "states.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "states.safetensors").write_bytes(data)
    with pytest.raises(ArtifactError, match=r"damaged, first \[2\]"):
        ItemStates.open(tmp_path)
    assert len(ItemStates.open(tmp_path, verify=False)) == 5


def test_open_maps_the_file_and_does_not_copy_it(tmp_path):
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("this system does not tell mapped memory from a process's own")

    def own_bytes():
        return (
            next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("RssAnon")) << 10
        )

    size = 64 << 20
    file = BlockFile(tmp_path, "states", "states", {}, (1024, 4, size // 4 // 4096), "float32", 1024)
    file.create()
    file.write(0, torch.zeros(file.shape))
    before = own_bytes()
    states = ItemStates.open(tmp_path)
    assert float(states.values.sum()) == 0.0  # every page read
    assert states.values.nbytes == size and own_bytes() - before < size // 4
