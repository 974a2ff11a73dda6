"""Small models for the tests, and plain loops that compute the expected logits."""

import torch
import torch.nn.functional as F

from mom_layers.hf import MomConfig, MomForCausalLM
from mom_layers.reference import mixture_of_memories_reference

VOCABULARY = 61
HYBRID = {"attn": {"layers": [1], "num_heads": 4, "num_kv_heads": 2}}
WINDOWED = {"attn": {"layers": [0], "num_heads": 2, "qkv_bias": True, "window_size": 5, "rope_theta": 500.0}}
LETTERS = "kvba"


def tiny_config(**changes) -> MomConfig:
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2, "head_dim": 8,
        "expand_v": 2, "num_memories": 4, "topk": 2, "intermediate_size": 48, "initializer_range": 0.15,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    return MomConfig(**sizes | changes)


def tiny_model(seed: int = 0, dtype: torch.dtype = torch.float32, **changes) -> MomForCausalLM:
    torch.manual_seed(seed)
    return MomForCausalLM(tiny_config(**changes)).eval().to(dtype)


def random_tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    """Token ids, none of which is the padding's."""
    return torch.randint(1, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    difference = actual.double() - expected.double()
    return (difference.norm() / expected.double().norm()).item()


def reference_logits(parameters: dict[str, torch.Tensor], config: MomConfig, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [T, vocabulary] of one sequence [T], token by token and memory by memory."""
    specs = {layer: spec for spec in config.attention_specs() for layer in spec.layers}
    x = parameters["model.embeddings.weight"][tokens]
    for index in range(config.num_hidden_layers):
        prefix = f"model.layers.{index}."
        layer = {name[len(prefix) :]: value for name, value in parameters.items() if name.startswith(prefix)}
        mixer = {name[len("attn.") :]: value for name, value in layer.items() if name.startswith("attn.")}
        y = rms_norm(x, layer["attn_norm.weight"], config.norm_eps)
        if index in specs:
            x = x + attention_reference(y, mixer, specs[index])
        else:
            x = x + mixture_of_memories_reference(
                y, memory_names(mixer, config), num_heads=config.num_heads, topk=config.topk, shared=config.shared_mem
            )
        y = rms_norm(x, layer["mlp_norm.weight"], config.norm_eps)
        hidden = F.silu(y @ layer["mlp.gate_proj.weight"].T) * (y @ layer["mlp.up_proj.weight"].T)
        x = x + hidden @ layer["mlp.down_proj.weight"].T
    head = parameters.get("lm_head.weight", parameters["model.embeddings.weight"])
    return rms_norm(x, parameters["model.norm.weight"], config.norm_eps) @ head.T


def rms_norm(x, weight, eps):
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def memory_names(p, config):
    """A MoM layer's parameters by the names that the layer's reference reads."""
    groups = [] if config.single_kv_proj else [f"{{}}_proj.{m}.weight" for m in range(config.num_memories)]
    if config.single_kv_proj or config.shared_mem:
        groups.append("shared_{}.weight")
    return {
        "router.weight": p["gate.weight"],
        "q_proj.weight": p["q_proj.weight"],
        "gate_proj.weight": p["g_proj.weight"],
        "out_proj.weight": p["o_proj.weight"],
        "norm_weight": p["o_norm.weight"],
        "rule_parameters.A_log": p["A_log"],
        "rule_parameters.dt_bias": p["dt_bias"],
        "memory_proj": torch.stack([torch.cat([p[group.format(letter)] for letter in LETTERS]) for group in groups]),
        **{
            f"{name}_conv": p[f"{name}_conv1d.weight"][:, 0]
            for name in ("q", "k", "v", "text")
            if f"{name}_conv1d.weight" in p
        },
    }


def attention_reference(x, p, spec):
    """x [T, D]: one query, one head at a time; rotary embedding as a complex number for each pair of channels."""
    length, hidden = x.shape
    width = hidden // spec.num_heads
    projected = {n: x @ p[f"{n}_proj.weight"].T + p.get(f"{n}_proj.bias", 0.0) for n in "qkv"}
    frequency = spec.rope_theta ** -(torch.arange(0, width, 2, dtype=x.dtype) / width)
    turns = torch.polar(torch.ones_like(frequency), torch.arange(length)[:, None] * frequency)

    def head(name, index):
        return projected[name][:, index * width : (index + 1) * width]

    def turned(y):
        z = torch.complex(y[:, : width // 2], y[:, width // 2 :]) * turns
        return torch.cat([z.real, z.imag], dim=1)

    heads = []
    for index in range(spec.num_heads):
        shared = index // (spec.num_heads // spec.num_kv_heads)
        q, k, v = turned(head("q", index)), turned(head("k", shared)), head("v", shared)
        rows = []
        for t in range(length):
            first = 0 if spec.window_size is None else max(0, t + 1 - spec.window_size)
            scores = k[first : t + 1] @ q[t] / width**0.5
            rows.append(torch.softmax(scores, 0) @ v[first : t + 1])
        heads.append(torch.stack(rows))
    return torch.cat(heads, dim=1) @ p["o_proj.weight"].T
