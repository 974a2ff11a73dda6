"""What the tests of layers and kernels share: the device, relative errors, small layers, plans and random tensors."""

import torch

from mom_layers import MixtureOfMemories
from mom_layers.route.plan import build_routing_plan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RAGGED = [0, 1, 2, 3, 63, 64, 65]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2}


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """|got - expected| / |expected|, or |got| where expected is zero; infinity where a difference is not finite."""
    got, expected = got.detach().double().cpu(), expected.detach().double().cpu()
    norm = expected.norm()
    error = (got - expected).norm() / (norm if norm > 0 else 1.0)
    return error.item() if error.isfinite() else float("inf")


def layer(dtype=torch.float64, favour: dict[int, float] | None = None, **sizes) -> MixtureOfMemories:
    """A small layer whose weights are so large that every part of the layer shows in its output.

    favour: memory -> the number that is added to the memory's router logit, through the first feature of x, which
    `inputs` sets to 1.
    """
    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_heads": 2, "head_dim": 16}
    if sizes.get("kernels") == "triton":  # the interpreter's time grows with segments and heads
        small |= {"num_heads": 1, "num_memories": 2, "topk": 1}
    module = MixtureOfMemories(**(small | sizes))
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("_proj.weight") or name in ("router.weight", "memory_proj"):
                parameter.mul_(8)
            if name == "norm_weight":
                parameter.normal_(1.0, 0.2)
        for memory, logit in (favour or {}).items():
            module.router.weight[memory, 0] = logit
    return module.to(DEVICE, dtype)


def inputs(batch, length, hidden=32, dtype=torch.float64, seed=1) -> torch.Tensor:
    """x [batch, length, hidden], with ones for the first feature."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, length, hidden, generator=generator, dtype=torch.float64)
    x[..., 0] = 1.0
    return x.to(DEVICE, dtype).requires_grad_()


def make_plan(lengths=RAGGED, num_memories=4, topk=2, shared=True, masked=False, unpicked=0):
    """The plan of random choices, made in PyTorch. No token chooses a memory below `unpicked`; every token chooses all
    other memories where topk is their number."""
    generator = torch.Generator().manual_seed(0)
    tokens = sum(lengths)
    ids = torch.rand(tokens, num_memories - unpicked, generator=generator).topk(topk).indices + unpicked
    return build_routing_plan(
        ids.to(DEVICE),
        torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int(),
        num_memories=num_memories,
        shared=shared,
        token_mask=(torch.rand(tokens, generator=generator) < 0.7).to(DEVICE) if masked else None,
        kernels="torch",
    )


def draw(*shape, dtype=torch.float32, seed=1):
    """Normal random numbers, the same on every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)
