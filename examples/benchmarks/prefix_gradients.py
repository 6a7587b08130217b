"""Size of the prefix's gradient, row by row: virtual tokens drawn at random against tokens that start from words.

    python examples/benchmarks/prefix_gradients.py

Rows of one film of MovieLens-100K and a target against a table of the first films, the contrastive loss, one gradient a
row. A vector that is no word can turn into an attention sink, and a batch's gradient into that of its worst row.
"""

import argparse

import torch

from peft_bituning import BiTuningConfig
from peft_bituning.assembly import assemble
from peft_bituning.base_models import load_base_model
from peft_bituning.catalog import ItemTable
from peft_bituning.catalog.encoder import HistorySettings
from peft_bituning.data import Interactions, LeaveOneOut, load_interactions
from peft_bituning.losses import catalog_contrastive_loss
from peft_bituning.tuners.vocabulary import embeddings_of

WORDS = "You are an intelligent recommendation assistant. Please summarize the user's characteristics"


def row_gradients(start: str, data: Interactions, arguments: argparse.Namespace) -> torch.Tensor:
    """Return the norm of each row's gradient with respect to the prefix, times the norm of a word's embedding.

    Args:
        start: `random` or `words`.
        data: the histories.
        arguments: the command line.

    Returns:
        [rows].
    """
    base = load_base_model(arguments.model)
    ids = base.tokenizer(WORDS, add_special_tokens=False)["input_ids"]
    newline = base.tokenizer("\n", add_special_tokens=False)["input_ids"][-1]
    torch.manual_seed(arguments.seed)
    config = BiTuningConfig(
        prefix_encoder="static",
        num_virtual_tokens=arguments.num_virtual_tokens,
        prefix_token_ids=ids if start == "words" else None,
        suffix_token_id=newline if start == "words" else None,
    )
    encoder = assemble(base, config, data.items, template="no_instruction", settings=HistorySettings(max_history=1))
    table = ItemTable.from_embeddings(encoder.encode_items(arguments.items)).embeddings
    prefix = next(value for name, value in encoder.model.named_parameters() if value.requires_grad and "prefix" in name)
    samples = LeaveOneOut(data.histories).training_samples("every_cut", arguments.seed)
    norms = []
    for sample in [each for each in samples if each.target < arguments.items][: arguments.rows]:
        output, _ = encoder.forward([sample.history])
        loss = catalog_contrastive_loss(output["pooler_output"], table, torch.tensor([sample.target]))
        norms.append(torch.autograd.grad(loss, prefix)[0].norm())
    words = embeddings_of(base.model, list(range(1000))).norm(dim=1).mean()
    return torch.stack(norms) * words


def main() -> None:
    """Print one line a start."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--num_virtual_tokens", type=int, default=8)
    parser.add_argument("--items", type=int, default=400)
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    data = load_interactions("ml-100k")
    for start in ("random", "words"):
        norms = row_gradients(start, data, arguments)
        quantiles = norms.quantile(torch.tensor([0.5, 0.9, 1.0])).tolist()
        print(f"{start}: median {quantiles[0]:.1f}, 90 % {quantiles[1]:.1f}, most {quantiles[2]:.1f}")


if __name__ == "__main__":
    main()
