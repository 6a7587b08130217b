"""Count what each tuning method trains, at the sizes of the Laser paper's Table 3; no weights are read.

    python examples/benchmarks/parameters.py

prints a Markdown table with the paper's own counts beside ours.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from transformers import AutoModelForCausalLM, GlmConfig, GPT2Config, LlamaConfig, PreTrainedConfig

from peft_bituning import BiTuningConfig
from peft_bituning.tuners.ilora import ILoRAConfig

# The shape of ChatGLM2-6B, which transformers has no class for.
CHATGLM2 = GlmConfig(
    vocab_size=65024,
    hidden_size=4096,
    intermediate_size=13696,
    num_hidden_layers=28,
    num_attention_heads=32,
    num_key_value_heads=2,
    head_dim=128,
    attention_bias=True,
    pad_token_id=0,
)
LLAMA2 = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
GPT2_LARGE = GPT2Config(n_embd=1280, n_layer=36, n_head=20)
QUERY_AND_VALUE = ["q_proj", "v_proj"]
COLLABORATIVE_DIM = 64


@dataclass(frozen=True)
class Row:
    """A method on a language model.

    Args:
        name: of the row.
        base: the language model's sizes.
        config: makes the adapter's settings; None trains every weight.
        paper: what the paper prints, in millions; None where it prints nothing.
    """

    name: str
    base: PreTrainedConfig
    config: Callable[[], PeftConfig] | None
    paper: float | None = None


ROWS = [
    Row("LLM4REC: GPT-2 Large, every weight (without its user and item tokens)", GPT2_LARGE, None, 787.3),
    Row(
        "LlamaRec: Llama-2-7B, LoRA r=8 on queries and values",
        LLAMA2,
        lambda: LoraConfig(r=8, target_modules=QUERY_AND_VALUE, task_type="FEATURE_EXTRACTION"),
        4.194,
    ),
    Row(
        "iLoRA: Llama-2-7B, r=8 on all linear layers, 4 experts, gate included",
        LLAMA2,
        lambda: ILoRAConfig(collaborative_dim=COLLABORATIVE_DIM),
    ),
    Row(
        "Bi-Tuning: ChatGLM2-6B, 32 static virtual tokens and the suffix",
        CHATGLM2,
        lambda: BiTuningConfig(prefix_encoder="static"),
        0.135,
    ),
    Row(
        "Bi-Tuning: ChatGLM2-6B, linear prefix",
        CHATGLM2,
        lambda: BiTuningConfig(prefix_encoder="linear", collaborative_dim=COLLABORATIVE_DIM),
    ),
    Row(
        "Laser: ChatGLM2-6B, M-Former of the paper's sizes (the paper counts weights that nothing reads)",
        CHATGLM2,
        lambda: BiTuningConfig(collaborative_dim=COLLABORATIVE_DIM),
        183.3,
    ),
]


def count(row: Row) -> tuple[int, int]:
    """Count a row's weights; the language model itself takes no memory.

    Args:
        row: which method on which model.

    Returns:
        Trained weights, and those of the language model.
    """
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(row.base)
    total = sum(parameter.numel() for parameter in base.parameters())
    if row.config is None:
        return total, total
    model = get_peft_model(base, row.config())
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad), total


def main() -> None:
    """Print the table."""
    print("| tuning | trained weights | of the language model | the paper |")
    print("| --- | --- | --- | --- |")
    for row in ROWS:
        trained, total = count(row)
        paper = "-" if row.paper is None else f"{row.paper} M"
        print(f"| {row.name} | {trained:,} | {trained / total:.3%} | {paper} |")


if __name__ == "__main__":
    main()
