"""Makes tests/goldens/ops_moe/<name>.npz: routers and routed experts of Hugging Face models, tiny, random, float32.

Needs torch and transformers (the "oracle" extra): `python tests/goldens/make_moe_goldens.py`. The results are committed.
"""

import json
from pathlib import Path

import numpy as np
import torch
from transformers import DeepseekV3Config, KimiLinearConfig, Qwen3MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearMoE
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

OUT = Path(__file__).parent / "ops_moe"
TOKENS, D, F = 23, 16, 12
SIZES = {"hidden_size": D, "moe_intermediate_size": F}


def grouped(experts: int, top_k: int, groups: int, top_groups: int, scale: float, renormalize: bool) -> dict[str, object]:
    return {
        "num_local_experts": experts, "num_experts_per_tok": top_k, "n_group": groups, "topk_group": top_groups,
        "routed_scaling_factor": scale, "norm_topk_prob": renormalize,
    }  # fmt: skip


def softmax(renormalize: bool) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(**SIZES, num_experts=10, num_experts_per_tok=3, norm_topk_prob=renormalize)


BLOCKS = {
    "kimi_linear": KimiLinearMoE(KimiLinearConfig(**SIZES, **grouped(16, 4, 4, 2, 2.446, True))),
    "deepseek_v3": DeepseekV3MoE(DeepseekV3Config(**SIZES, **grouped(12, 3, 3, 1, 2.5, False))),
    "qwen3_moe": Qwen3MoeSparseMoeBlock(softmax(True)),
    "qwen3_moe_raw": Qwen3MoeSparseMoeBlock(softmax(False)),
}


@torch.no_grad()
def golden(block: torch.nn.Module, seed: int) -> dict[str, np.ndarray]:
    """Inputs, weights, the router's choice (in the order of experts: Hugging Face's own order is arbitrary) and the routed output."""
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(block.named_parameters()):
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    router, bias = block.gate, getattr(block.gate, "e_score_correction_bias", None)
    router.weight.mul_(2.0)
    if bias is not None:
        # Zero by default, which would hide whether it weighs as well as chooses.
        bias.copy_(0.3 * torch.randn(bias.shape, generator=generator))
    x = torch.randn((TOKENS, D), generator=generator)
    logits, weights, experts = router(x)
    output = block.experts(x, experts, weights)
    gate, up = block.experts.gate_up_proj.chunk(2, dim=1)
    by_expert = experts.argsort(dim=-1)
    arrays = {
        "x": x, "logits": logits, "gate": gate, "up": up, "down": block.experts.down_proj, "output": output,
        "experts": experts.gather(1, by_expert).int(), "weights": weights.gather(1, by_expert),
    }  # fmt: skip
    if bias is not None:
        arrays["bias"] = bias
    return {name: value.numpy() for name, value in arrays.items()}


def rules(block: torch.nn.Module) -> dict[str, object]:
    """Arguments of `route`."""
    router = block.gate
    sigmoid = hasattr(router, "e_score_correction_bias")
    return {
        "top_k": router.top_k,
        "scoring": "sigmoid" if sigmoid else "softmax",
        "num_groups": router.num_group if sigmoid else 1,
        "top_groups": router.topk_group if sigmoid else 1,
        "renormalize": router.norm_topk_prob,
        "scale": router.routed_scaling_factor if sigmoid else 1.0,
    }


if __name__ == "__main__":
    OUT.mkdir(exist_ok=True)
    for seed, (name, block) in enumerate(BLOCKS.items()):
        np.savez_compressed(OUT / f"{name}.npz", **golden(block.float(), seed))
    (OUT / "rules.json").write_text(json.dumps({name: rules(block) for name, block in BLOCKS.items()}, indent=2) + "\n")
