"""Tiny random causal language models of every kind that is known to work."""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 97
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_LOCAL_AND_FULL = ["sliding_attention", "full_attention"]
_MOE = {"num_experts": 4, "num_experts_per_tok": 2}
_LOCAL_MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}


@dataclass(frozen=True)
class Architecture:
    """One kind of language model.

    Args:
        name: as the table in docs/ calls it.
        model_type: transformers' name.
        kind: what is special about it.
        sizes: settings beside the common ones.
        in_ci: whether every run of the tests checks it; the others wait for `-m slow`.
    """

    name: str
    model_type: str
    kind: str
    sizes: dict[str, Any] = field(default_factory=dict)
    in_ci: bool = False

    def build(self, seed: int = 0) -> PreTrainedModel:
        """Make the model, the same weights for the same seed."""
        torch.manual_seed(seed)
        config = AutoConfig.for_model(self.model_type, **(SIZES | self.sizes))
        return AutoModelForCausalLM.from_config(config).eval()


ARCHITECTURES = [
    Architecture("Llama", "llama", "full attention", in_ci=True),
    Architecture("Mistral", "mistral", "sliding window", {"sliding_window": 4}, in_ci=True),
    Architecture("Qwen2", "qwen2", "full attention"),
    Architecture("Qwen3", "qwen3", "full attention, normed queries", {"head_dim": 8}, in_ci=True),
    Architecture("Gemma", "gemma", "scaled embeddings", {"head_dim": 8}, in_ci=True),
    Architecture(
        "Gemma 2",
        "gemma2",
        "scaled embeddings, sliding window, soft caps",
        {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8},
    ),
    Architecture(
        "Gemma 3",
        "gemma3_text",
        "scaled embeddings, local and full layers",
        {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8, "layer_types": _LOCAL_AND_FULL},
        in_ci=True,
    ),
    Architecture(
        "Gemma 3n",
        "gemma3n_text",
        "per-layer embeddings",
        {
            "head_dim": 8,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCABULARY,
            "laurel_rank": 4,
            "num_kv_shared_layers": 0,
            "layer_types": _LOCAL_AND_FULL,
            "sliding_window": 4,
            "activation_sparsity_pattern": [0.0, 0.0],
            "altup_num_inputs": 2,
        },
        in_ci=True,
    ),
    Architecture(
        "Gemma 4",
        "gemma4_text",
        "per-layer embeddings",
        {
            "head_dim": 8,
            "global_head_dim": 8,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCABULARY,
            "num_kv_shared_layers": 0,
            "layer_types": _LOCAL_AND_FULL,
            "sliding_window": 4,
        },
        in_ci=True,
    ),
    Architecture("Phi", "phi", "parallel blocks", in_ci=True),
    Architecture("Phi-3", "phi3", "full attention"),
    Architecture("GLM", "glm", "half rotary", {"head_dim": 8}),
    Architecture("GLM-4", "glm4", "half rotary, sandwich norms", {"head_dim": 8}),
    Architecture("StableLM", "stablelm", "partial rotary"),
    Architecture("OLMo 2", "olmo2", "norms after blocks", in_ci=True),
    Architecture("OLMo 3", "olmo3", "local and full layers", {"sliding_window": 4}),
    Architecture("Cohere", "cohere", "parallel blocks, scaled logits"),
    Architecture("Cohere 2", "cohere2", "local and full layers", {"sliding_window": 4}),
    Architecture("SmolLM3", "smollm3", "layers without positions"),
    Architecture("Granite", "granite", "scales inputs_embeds", {"embedding_multiplier": 3.0}, in_ci=True),
    Architecture("GPT-2", "gpt2", "absolute positions", in_ci=True),
    Architecture("GPT-J", "gptj", "parallel blocks", {"rotary_dim": 4}),
    Architecture(
        "GPT-Neo",
        "gpt_neo",
        "absolute positions, local and full layers",
        {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 4},
        in_ci=True,
    ),
    Architecture("GPT-NeoX", "gpt_neox", "parallel blocks", in_ci=True),
    Architecture("GPTBigCode", "gpt_bigcode", "absolute positions, one key head"),
    Architecture("CodeGen", "codegen", "parallel blocks", {"rotary_dim": 4}),
    Architecture(
        "OPT",
        "opt",
        "absolute positions, embeddings narrower than the states",
        {"ffn_dim": 48, "word_embed_proj_dim": 16},
        in_ci=True,
    ),
    Architecture(
        "XGLM", "xglm", "sinusoidal positions", {"ffn_dim": 48, "attention_heads": 4, "d_model": 32, "num_layers": 2}
    ),
    Architecture("Bloom", "bloom", "ALiBi", in_ci=True),
    Architecture("Falcon", "falcon", "one key head", {"alibi": False}),
    Architecture("Falcon, ALiBi", "falcon", "ALiBi", {"alibi": True}),
    Architecture("MPT", "mpt", "ALiBi"),
    Architecture("StarCoder2", "starcoder2", "full attention"),
    Architecture("Persimmon", "persimmon", "squared ReLU"),
    Architecture("Nemotron", "nemotron", "squared ReLU, partial rotary"),
    Architecture("Helium", "helium", "full attention", {"head_dim": 8}),
    Architecture("ERNIE 4.5", "ernie4_5", "full attention", {"head_dim": 8}),
    Architecture("EXAONE 4", "exaone4", "local and full layers", {"sliding_window": 4}),
    Architecture("Hunyuan", "hunyuan_v1_dense", "full attention", {"head_dim": 8}),
    Architecture("Seed-OSS", "seed_oss", "full attention", {"head_dim": 8}),
    Architecture("Mixtral", "mixtral", "mixture of experts", _LOCAL_MOE, in_ci=True),
    Architecture(
        "Qwen2-MoE",
        "qwen2_moe",
        "mixture of experts, one shared",
        _MOE | {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    ),
    Architecture("Qwen3-MoE", "qwen3_moe", "mixture of experts", _MOE | {"moe_intermediate_size": 16, "head_dim": 8}),
    Architecture("OLMoE", "olmoe", "mixture of experts", _MOE),
    Architecture("Granite-MoE", "granitemoe", "mixture of experts", _LOCAL_MOE),
    Architecture("Phi-MoE", "phimoe", "mixture of experts", _LOCAL_MOE),
    Architecture(
        "DeepSeek-V3",
        "deepseek_v3",
        "mixture of experts, latent attention",
        {
            "q_lora_rank": 16,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
            "num_key_value_heads": 4,
        },
        in_ci=True,
    ),
    Architecture(
        "GPT-OSS",
        "gpt_oss",
        "mixture of experts, attention sinks, sliding window",
        _LOCAL_MOE | {"head_dim": 8, "sliding_window": 4},
        in_ci=True,
    ),
    Architecture("Mamba", "mamba", "state space", {"state_size": 4}, in_ci=True),
    Architecture(
        "Mamba 2",
        "mamba2",
        "state space",
        {"state_size": 4, "num_heads": 4, "head_dim": 16, "n_groups": 1, "expand": 2, "chunk_size": 8},
    ),
    Architecture("RWKV", "rwkv", "recurrent", {"attention_hidden_size": 32, "context_length": 64}, in_ci=True),
    Architecture(
        "RecurrentGemma",
        "recurrent_gemma",
        "recurrent and local attention",
        {"lru_width": 32, "attention_window_size": 8, "block_types": ["recurrent", "attention"], "head_dim": 8},
        in_ci=True,
    ),
    Architecture(
        "Jamba",
        "jamba",
        "state space and attention, mixture of experts",
        {
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
        in_ci=True,
    ),
    Architecture(
        "Bamba",
        "bamba",
        "state space and attention",
        {
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 4,
            "mamba_n_groups": 1,
            "attn_layer_indices": [1],
            "mamba_chunk_size": 8,
        },
    ),
    Architecture(
        "Falcon-H1",
        "falcon_h1",
        "state space beside attention",
        {
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 4,
            "mamba_n_groups": 1,
            "mamba_chunk_size": 8,
            "mamba_d_ssm": 64,
            "head_dim": 8,
        },
    ),
    Architecture(
        "LFM2", "lfm2", "convolution and attention", {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8}
    ),
    Architecture(
        "Qwen3-Next",
        "qwen3_next",
        "linear and full attention, mixture of experts",
        _MOE
        | {
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "head_dim": 8,
        },
        in_ci=True,
    ),
]
