"""A layer of one memory alone, for every rule: beside a layer whose router sends every token to its only memory."""

import copy

import pytest
import torch
from comparison import DEVICE, TOLERANCE, relative_error

from mom_layers import LinearAttentionLayer, MixtureOfMemories, get_rule, rule_names
from mom_layers.one_memory import mix_projected
from mom_layers.route.sequences import plan_sequences

HIDDEN, HEADS, K = 32, 2, 16


@pytest.fixture(autouse=True)
def on_the_device():
    with torch.device(DEVICE):
        yield


def layer(rule="gated_deltanet", dtype=torch.float64, kernels="torch", **sizes):
    torch.manual_seed(0)
    module = LinearAttentionLayer(HIDDEN, rule, num_heads=HEADS, head_dim=K, kernels=kernels, **sizes)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter + 0.1 * torch.randn(parameter.shape))
    return module.to(dtype)


def routed(module):
    """The same computation by a layer with a router over one memory."""
    settings = module.settings
    twin = MixtureOfMemories(
        HIDDEN, HEADS, K, settings.expand_v, num_memories=1, topk=1, shared_memory=False, rule=settings.rule,
        conv_kernel=settings.conv_kernel, kernels="torch",
    ).double()  # fmt: skip
    keys, *memory, values = settings.fused_sizes
    q, memory, gate = module.in_proj.weight.detach().double().split((keys, sum(memory), values))
    own = {name: value for name, value in module.state_dict().items() if name != "in_proj.weight"}
    own |= {"q_proj.weight": q, "gate_proj.weight": gate, "memory_proj": memory[None]}
    twin.load_state_dict(own | {"router.weight": twin.router.weight})
    return twin


def gradients(module, x, g, **call):
    x = x.detach().requires_grad_()
    out, state = module(x, **call)
    total = (out * g).sum()
    if state is not None:
        total = total + (state.recurrent * torch.arange(state.recurrent.numel()).view_as(state.recurrent).sin()).sum()
    names, parameters = zip(*((n, p) for n, p in module.named_parameters() if p.requires_grad), strict=True)
    found = torch.autograd.grad(total, (x, *parameters), allow_unused=True)
    return out, state, dict(zip(("x", *names), found, strict=True))


@pytest.mark.parametrize("conv_kernel", [4, 1])
@pytest.mark.parametrize("rule", rule_names())
def test_is_a_memory_that_gets_every_token(rule, conv_kernel):
    module = layer(rule, expand_v=2.0, conv_kernel=conv_kernel)
    twin = routed(module)
    x, g = torch.randn(2, 2, 21, HIDDEN, dtype=torch.float64)
    mask = torch.ones(2, 21, dtype=torch.bool)
    mask[1, :5] = False
    documents = torch.tensor([0, 4, 4, 21], dtype=torch.int32)
    for call, batch in (({}, 2), ({"token_mask": mask}, 2), ({"cu_seqlens": documents}, 1)):
        out, state, mine = gradients(module, x[:batch], g[:batch], output_state=True, **call)
        expected, expected_state, theirs = gradients(twin, x[:batch], g[:batch], output_state=True, **call)
        assert relative_error(out, expected) <= 1e-9
        assert relative_error(state.recurrent, expected_state.recurrent) <= 1e-9
        keys, *memory, values = module.settings.fused_sizes
        theirs["in_proj.weight"] = torch.cat(
            [theirs["q_proj.weight"], theirs["memory_proj"][0], theirs["gate_proj.weight"]]
        )
        for name, gradient in mine.items():
            assert relative_error(gradient, theirs[name]) <= 1e-9, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "rule,sizes",
    [("gated_deltanet", {}), ("gated_deltanet", {"conv_kernel": 1, "expand_v": 2.0}), ("gla", {"conv_kernel": 2})],
    ids=str,
)
def test_kernels_agree(rule, sizes, dtype, poisoned_memory):
    """Triton beside PyTorch in float64: sequences, documents, padding, and a state before and after."""
    module = layer(rule, dtype, "triton", **sizes)
    exact = copy.deepcopy(module).double()
    exact.kernels = "torch"
    x, g = torch.randn(2, 2, 70, HIDDEN, dtype=torch.float64).to(dtype)
    mask = torch.ones(2, 70, dtype=torch.bool)
    mask[0, :3] = False
    documents = torch.tensor([0, 3, 3, 70], dtype=torch.int32)
    with torch.no_grad():
        before = exact(x.double(), output_state=True)[1]
    mine = copy.deepcopy(before)
    for name in ("q_tail", "k_tail", "v_tail"):
        setattr(mine, name, getattr(before, name).to(dtype))
        setattr(before, name, getattr(mine, name).double())
    mine.recurrent = before.recurrent.float()
    for call, exact_call, batch in (
        ({}, {}, 2), ({"token_mask": mask}, {"token_mask": mask}, 2),
        ({"cu_seqlens": documents}, {"cu_seqlens": documents}, 1), ({"state": mine}, {"state": before}, 2),
    ):  # fmt: skip
        out, state, got = gradients(module, x[:batch], g[:batch], output_state=True, **call)
        expected, expected_state, right = gradients(
            exact, x[:batch].double(), g[:batch].double(), output_state=True, **exact_call
        )
        assert relative_error(out, expected) <= TOLERANCE[dtype]
        for name in ("recurrent", "q_tail", "k_tail", "v_tail"):
            if getattr(state, name).numel():
                assert relative_error(getattr(state, name), getattr(expected_state, name)) <= TOLERANCE[dtype], name
        for name, gradient in got.items():
            # A gradient comes through all operations of both passes, and bf16 rounds between every two of them; the
            # terms of a decay rate's gradient cancel.
            bf16 = 5 if name.startswith("rule_parameters") else 2
            tolerance = (bf16 if dtype == torch.bfloat16 else 1) * TOLERANCE[dtype]
            assert relative_error(gradient, right[name]) <= tolerance, (name, list(call))


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_tokens_may_lie_time_first(kernels):
    """[T, B] as [B, T]: outputs and every gradient, without a transposed copy of the tokens."""
    module = layer(dtype=torch.float32, kernels=kernels)
    projected = torch.randn(3, 40, module.in_proj.out_features)
    g = torch.randn(3, 40, HEADS * K)
    borders = torch.arange(0, 121, 40, dtype=torch.int32)
    found = []
    for time_major in (False, True):
        leaf = (projected.transpose(0, 1) if time_major else projected).flatten(0, 1).requires_grad_()
        weight = (g.transpose(0, 1) if time_major else g).flatten(0, 1)
        plan = plan_sequences(borders, 120, time_major=time_major)
        assert plan.rows_are_tokens is not time_major
        y, _ = mix_projected(leaf, plan, module.memory_parameters(), kernels=kernels)
        gradient, conv = torch.autograd.grad((y * weight).sum(), (leaf, module.k_conv))
        shape = (40, 3) if time_major else (3, 40)
        pair = [z.unflatten(0, shape).transpose(0, 1) if time_major else z.unflatten(0, shape) for z in (y, gradient)]
        found.append([*pair, conv])
    for batch_first, time_first in zip(*found, strict=True):
        assert relative_error(time_first, batch_first.double()) <= 1e-5


@pytest.mark.parametrize("conv_kernel", [4, 1])
@pytest.mark.parametrize(
    "rule,kernels",
    # A rule with a decode step and a rule without in Triton's interpreter; on a GPU every rule.
    [(rule, "torch") for rule in rule_names()]
    + [(rule, "triton") for rule in (rule_names() if DEVICE == "cuda" else ("gated_deltanet", "gla"))],
)
def test_decoding_equals_the_whole(rule, conv_kernel, kernels):
    if kernels == "triton" and not get_rule(rule).has_kernels(K, K):
        kernels = "torch"
    module = layer(rule, torch.float32, kernels, conv_kernel=conv_kernel)
    x = torch.randn(3, 9, HIDDEN)
    with torch.no_grad():
        exact = copy.deepcopy(module).double()
        exact.kernels = "torch"
        whole, last = exact(x.double(), output_state=True)
        first, state = module(x[:, :6], output_state=True)
        out = torch.cat([first, *(module.step(x[:, t], state)[:, None] for t in range(6, 9))], dim=1)
    assert relative_error(out, whole) <= 1e-5
    assert relative_error(state.recurrent, last.recurrent) <= 1e-5


def test_refuses_what_a_router_needs():
    with pytest.raises(TypeError, match="a layer of one memory has no topk"):
        LinearAttentionLayer(HIDDEN, topk=2)
    with pytest.raises(ValueError, match="num_memories must be at least 1, got 0: LinearAttentionLayer"):
        MixtureOfMemories(HIDDEN, num_memories=0, topk=0)
    with pytest.raises(ValueError, match="num_memories=0 makes a layer of one memory.*topk must be 0, got 2"):
        MixtureOfMemories(HIDDEN, num_memories=0)
    with pytest.raises(ValueError, match="unknown memory rule 'softmax': choose one of"):
        LinearAttentionLayer(HIDDEN, "softmax")
    with pytest.raises(ValueError, match="head_dim = 24 is not supported by the gla kernels"):
        LinearAttentionLayer(HIDDEN, "gla", head_dim=24, kernels="triton")
