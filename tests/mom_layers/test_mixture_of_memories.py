"""The layer against the plain reference, and what must never reach what."""

import pytest
import torch
from comparison import DEVICE, TOLERANCE, inputs, layer, relative_error

from mom_layers import MixtureOfMemories
from mom_layers.reference import mixture_of_memories_reference

LENGTHS = [1, 2, 3, 63, 64, 65, 127, 500]
# The kernels' own tests have the long and ragged cases: in the interpreter a whole layer takes seconds.
KERNELS = [("torch", torch.float64), ("triton", torch.float32)]
EVERY_RULE = pytest.mark.parametrize("rule", ["gated_deltanet", "gla", "kda", "gated_deltanet2"])


def assert_agrees(module, x, dtype, kernels, cu_seqlens=None):
    """Outputs and every gradient of `module` on x equal the reference's in float64."""
    module.kernels = kernels
    exact = {name: p.detach().double().cpu().requires_grad_() for name, p in module.named_parameters()}
    exact_x = x.detach().double().cpu().requires_grad_()
    settings = {"num_heads": module.num_heads, "topk": module.topk, "shared": module.shared_memory}
    settings["rule"] = module.rule.name
    if cu_seqlens is None:
        sequences = list(exact_x)
    else:
        sequences = exact_x[0].split((cu_seqlens[1:] - cu_seqlens[:-1]).tolist())
    expected = torch.cat([mixture_of_memories_reference(s, exact, **settings) for s in sequences])
    expected = expected.view(exact_x.shape)
    got, _ = module(x, cu_seqlens=None if cu_seqlens is None else cu_seqlens.to(DEVICE))
    grad = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    leaves = [exact_x, *exact.values()]
    expected_grads = torch.autograd.grad(expected, leaves, grad, allow_unused=True)
    got_grads = torch.autograd.grad(got, [x, *module.parameters()], grad.to(got), allow_unused=True)

    tolerance = TOLERANCE[dtype]
    assert relative_error(got, expected) <= tolerance
    for name, mine, theirs in zip(["x", *exact], got_grads, expected_grads, strict=True):
        scale = exact_x.norm() if name == "x" else exact[name].norm()
        if theirs is None or theirs.norm() <= 1e-9 * scale:  # a router of one memory, or of top-1, learns nothing
            assert mine is None or mine.double().norm() <= 1e-4 * scale, name
        else:  # decays' gradients are differences of larger sums
            assert relative_error(mine, theirs) <= (3 if name.startswith("rule_parameters") else 1) * tolerance, name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("length", LENGTHS)
@EVERY_RULE
def test_agrees_at_every_length(rule, length, dtype):
    batch = 1 if length == 500 else 2
    assert_agrees(layer(dtype, rule=rule), inputs(batch, length, dtype=dtype), dtype, "torch")


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("memories,topk", [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (8, 1), (8, 2)])
def test_agrees_for_every_number_of_memories(memories, topk, shared):
    module = layer(num_memories=memories, topk=topk, shared_memory=shared)
    assert_agrees(module, inputs(2, 21), torch.float64, "torch")


@pytest.mark.parametrize("kernels,dtype", KERNELS)
@pytest.mark.parametrize("sizes", [{}, {"expand_v": 2.0}, {"single_kv_proj": True}, {"conv_kernel": 2}])
@EVERY_RULE
def test_agrees_for_other_shapes(rule, sizes, kernels, dtype):
    x = inputs(2, 35 if kernels == "torch" else 9, dtype=dtype)
    assert_agrees(layer(dtype, rule=rule, kernels=kernels, **sizes), x, dtype, kernels)


@pytest.mark.parametrize("kernels,dtype", KERNELS)
@pytest.mark.parametrize(
    "favour", [{1: -50.0}, {1: 50.0}, {0: 50.0, 3: 50.0}], ids=["no token", "every token", "only two memories"]
)
def test_agrees_when_a_memory_is_never_or_always_chosen(favour, kernels, dtype):
    x = inputs(*((2, 66) if kernels == "torch" else (1, 7)), dtype=dtype)
    assert_agrees(layer(dtype, favour=favour, num_heads=2 if kernels == "torch" else 1), x, dtype, kernels)


@pytest.mark.parametrize("length", [1, 65])
@EVERY_RULE
def test_triton_agrees(rule, length):
    assert_agrees(layer(torch.float32, rule=rule), inputs(1, length, dtype=torch.float32), torch.float32, "triton")


@pytest.mark.parametrize("kernels,dtype", KERNELS)
@EVERY_RULE
def test_packed_documents_agree(rule, kernels, dtype):
    cu_seqlens = torch.tensor([0, 5, 5, 6, 70, 90] if kernels == "torch" else [0, 5, 5, 6, 14], dtype=torch.int32)
    module, x = layer(dtype, rule=rule, kernels=kernels), inputs(1, int(cu_seqlens[-1]), dtype=dtype)
    assert_agrees(module, x, dtype, kernels, cu_seqlens)


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@EVERY_RULE
def test_training_equals_evaluation(rule, kernels):
    module = layer(torch.float32, rule=rule, kernels=kernels)
    x = inputs(2, 70 if kernels == "torch" else 9, dtype=torch.float32)
    trained, _ = module.train()(x)
    evaluated, _ = module.eval()(x)
    assert torch.equal(trained, evaluated)
    with torch.no_grad():
        assert torch.equal(module(x)[0], evaluated)


@pytest.mark.parametrize("kernels,dtype", KERNELS)
def test_nothing_crosses_sequences_or_documents(kernels, dtype):
    module = layer(dtype, kernels=kernels)
    x = inputs(3, 20 if kernels == "torch" else 5, dtype=dtype)
    (grad,) = torch.autograd.grad(module(x)[0][1].square().sum(), x)
    assert grad[1].abs().sum() > 0 and grad[0].abs().max() == 0 and grad[2].abs().max() == 0

    first, last, length = (3, 40, 60) if kernels == "torch" else (3, 8, 12)
    x = inputs(1, length, dtype=dtype)
    cu_seqlens = torch.tensor([0, first, last, length], dtype=torch.int32, device=DEVICE)
    (grad,) = torch.autograd.grad(module(x, cu_seqlens=cu_seqlens)[0][0, first:last].square().sum(), x)
    assert grad[0, first:last].abs().sum() > 0
    assert grad[0, :first].abs().max() == 0 and grad[0, last:].abs().max() == 0


@pytest.mark.parametrize("kernels,dtype", KERNELS)
def test_nothing_comes_from_the_future(kernels, dtype):
    module, x = layer(dtype, kernels=kernels), inputs(1, 70 if kernels == "torch" else 10, dtype=dtype)
    y, _ = module(x)
    for token in (0, 1, 30, 63, 64) if kernels == "torch" else (0, 5):
        (grad,) = torch.autograd.grad(y[0, token].square().sum(), x, retain_graph=True)
        assert grad[0, token].abs().sum() > 0
        assert grad[0, token + 1 :].abs().max() == 0


@pytest.mark.parametrize("kernels,dtype", KERNELS)
def test_a_memory_hears_only_its_tokens(kernels, dtype):
    """Without the shared memory, a token's output depends on no token that chose other memories only."""
    module = layer(dtype, num_memories=4, topk=1, shared_memory=False, kernels=kernels)
    x = inputs(1, 40 if kernels == "torch" else 12, dtype=dtype)
    chosen = module.router(x).topk(1, dim=-1).indices[0, :, 0]
    memory = int(chosen[-1])
    (grad,) = torch.autograd.grad(module(x)[0][0, -1].square().sum(), x)
    assert grad[0, chosen == memory].abs().sum() > 0
    assert grad[0, chosen != memory].abs().max() == 0


@pytest.mark.parametrize("kernels,dtype", KERNELS)
@pytest.mark.parametrize("single_kv_proj", [False, True])
@EVERY_RULE
def test_pieces_equal_the_whole(rule, kernels, dtype, single_kv_proj):
    """Prefill in pieces and decoding token by token give what one forward gives, state included."""
    lengths = [1, 1, 2, 64, 1, 1, 5] if kernels == "torch" else [1, 4, 1]
    module = layer(dtype, rule=rule, kernels=kernels, single_kv_proj=single_kv_proj)
    x = inputs(3, sum(lengths), dtype=dtype)
    with torch.no_grad():
        whole, whole_state = module(x, output_state=True)
        pieces, state, first = [], None, 0
        for length in lengths:
            y, state = module(x[:, first : first + length], state=state, output_state=True)
            pieces.append(y)
            first += length
    assert relative_error(torch.cat(pieces, 1), whole) <= TOLERANCE[dtype]
    for name in ("recurrent", "q_tail", "k_tail", "v_tail"):
        assert relative_error(getattr(state, name), getattr(whole_state, name)) <= TOLERANCE[dtype], name
    chosen = state.select(torch.tensor([2, 2, 0], device=DEVICE))
    assert torch.equal(chosen.recurrent[1], state.recurrent[2]) and chosen.nbytes == state.nbytes


@pytest.mark.parametrize("kernels,dtype", KERNELS)
@EVERY_RULE
def test_gradients_flow_through_the_state(rule, kernels, dtype):
    module, x = layer(dtype, rule=rule, kernels=kernels), inputs(2, 20 if kernels == "torch" else 6, dtype=dtype)
    whole, _ = module(x)
    _, state = module(x[:, :4], output_state=True)
    rest, _ = module(x[:, 4:], state=state)
    grad = torch.randn_like(rest)
    (expected,) = torch.autograd.grad(whole[:, 4:], x, grad)
    (got,) = torch.autograd.grad(rest, x, grad)
    assert relative_error(got, expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize("kernels,dtype", KERNELS)
def test_padding_reaches_no_memory(kernels, dtype):
    length = 30 if kernels == "torch" else 9
    module, x = layer(dtype, kernels=kernels), inputs(3, length, dtype=dtype)
    mask = torch.ones(3, length, dtype=torch.bool, device=DEVICE)
    mask[0, :4] = False
    mask[2, :-1] = False
    with torch.no_grad():
        padded, padded_state = module(x, token_mask=mask, output_state=True)
        for row, first in [(0, 4), (1, 0), (2, length - 1)]:
            alone, state = module(x[row : row + 1, first:], output_state=True)
            assert relative_error(padded[row, first:], alone[0]) <= TOLERANCE[dtype]
            assert relative_error(padded_state.recurrent[row], state.recurrent[0]) <= TOLERANCE[dtype]
            assert relative_error(padded_state.k_tail[row], state.k_tail[0]) <= TOLERANCE[dtype]
    assert padded[~mask].abs().max() == 0


@EVERY_RULE
def test_bf16_stays_close_to_the_reference(rule):
    module = layer(torch.bfloat16, rule=rule)
    x = inputs(2, 65, dtype=torch.bfloat16)
    exact = {name: p.detach().double().cpu() for name, p in module.named_parameters()}
    # The reference routes by exact logits: keep tokens whose choice rounding cannot change.
    favour = torch.zeros(4, 32, dtype=torch.float64)
    favour[:2, 0] = 4.0
    exact["router.weight"] = favour + 0.1 * exact["router.weight"].sign()
    with torch.no_grad():
        module.router.weight.copy_(exact["router.weight"])
    exact["router.weight"] = module.router.weight.detach().double().cpu()
    settings = {"num_heads": 2, "topk": 2, "shared": True, "rule": rule}
    expected = torch.stack([mixture_of_memories_reference(s, exact, **settings) for s in x.detach().double().cpu()])
    assert relative_error(module(x)[0], expected) <= 2e-2  # the projections around the mixer round to bf16 too


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@EVERY_RULE
def test_autocast_runs_products_in_bf16(rule, kernels):
    """As Hugging Face's Trainer trains in bf16: float32 weights and inputs; decoding too."""
    # Every memory is chosen, so that rounding sends no token elsewhere.
    module = layer(torch.float32, rule=rule, kernels=kernels, num_memories=2, topk=2)
    x = inputs(2, 9, dtype=torch.float32)

    def run():
        y, _ = module(x)
        grads = torch.autograd.grad(y.float().square().sum(), [x, *module.parameters()])
        with torch.no_grad():
            _, state = module(x, output_state=True)
            return y, module.step(x[:, 0], state), *grads

    expected = run()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        got = run()
    assert got[0].dtype == got[1].dtype == torch.bfloat16
    for mine, exact in zip(got[:2], expected[:2], strict=True):
        assert relative_error(mine, exact) <= 3e-2
    assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in got[2:])


@pytest.mark.parametrize(
    "sizes,message",
    [
        ({"rule": "hebb"}, "unknown memory rule 'hebb'"),
        ({"num_memories": 2, "topk": 3}, "topk must be between 1 and the number of memories .2., got 3"),
        ({"head_dim": 10, "expand_v": 0.33}, "head_dim . expand_v a whole number, got 10 . 0.33"),
        ({"conv_kernel": 0}, "conv_kernel must be between 1 .no convolution. and 8, got 0"),
        ({"head_dim": 48, "kernels": "triton"}, "head_dim = 48 is not supported by the gated_deltanet kernels"),
        ({"rule": "gla", "head_dim": 48, "kernels": "triton"}, "head_dim = 48 is not supported by the gla kernels"),
    ],
)
def test_refuses_bad_sizes(sizes, message):
    with pytest.raises(ValueError, match=message):
        MixtureOfMemories(hidden_size=32, **sizes)


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda m, x: m(x[..., :31]), "x must be .B, T, 32., got .2, 8, 31."),
        (lambda m, x: m(x, cu_seqlens=torch.tensor([0, 8], dtype=torch.int32)), "got a batch of 2"),
        (lambda m, x: m(x, state=m(x[:1], output_state=True)[1]), "the state holds 1 sequences, the input 2"),
        (lambda m, x: m(x, token_mask=x.new_ones(2, 7, dtype=torch.bool)), "token_mask must be .2, 8., got .2, 7."),
    ],
)
def test_refuses_bad_inputs(call, message):
    with pytest.raises(ValueError, match=message):
        call(layer(torch.float32), inputs(2, 8, dtype=torch.float32))


@pytest.mark.gpu
@pytest.mark.parametrize("single_kv_proj", [False, True])
@EVERY_RULE
def test_training_step_never_waits_for_the_gpu(rule, single_kv_proj):
    module = MixtureOfMemories(1024, rule=rule, single_kv_proj=single_kv_proj).to("cuda", torch.bfloat16)
    x = torch.randn(2, 512, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    module(x)[0].sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        module(x)[0].sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@EVERY_RULE
def test_cuda_graph_of_a_training_step_replays_another_routing(rule):
    """Captured on one batch, replayed on others: outputs and gradients of the same step without a graph."""
    torch.manual_seed(0)
    module = MixtureOfMemories(256, num_heads=2, head_dim=128, rule=rule).to("cuda", torch.bfloat16)
    static = torch.randn(2, 300, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn_like(static)
    leaves = [static, *module.parameters()]

    def step():
        y = module(static)[0]
        return [y, *torch.autograd.grad(y, leaves, grad)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    pushes = torch.cat([torch.zeros_like(module.router.weight[:1]), 3 * module.router.weight[-1:]])
    for push in pushes:  # the second batch prefers one memory, so its segments have other lengths
        with torch.no_grad():
            static.copy_(torch.randn_like(static) + push)
        graph.replay()
        got = [x.clone() for x in captured]
        for replayed, expected in zip(got, step(), strict=True):
            assert relative_error(replayed, expected) <= 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim,expand_v,heads", [(256, 1.0, 4), (128, 1.0, 8), (128, 2.0, 4), (64, 1.0, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@EVERY_RULE
def test_triton_agrees_with_torch_at_real_sizes(rule, head_dim, expand_v, heads, dtype):
    """Outputs and gradients of the kernels against the chunked PyTorch path in float64."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "num_heads": heads, "head_dim": head_dim, "expand_v": expand_v}
    sizes["rule"] = rule
    module = MixtureOfMemories(**sizes, kernels="triton").to("cuda", dtype)
    exact = MixtureOfMemories(**sizes, kernels="torch").to("cuda", torch.float64)
    exact.load_state_dict(module.state_dict())
    x = torch.randn(3, 700, 512, device="cuda").to(dtype)
    with torch.no_grad():  # both must route alike, so the choice must not hang on rounding
        module.router.weight.zero_()[:, :4] = 64 * torch.eye(4)
        exact.router.weight.copy_(module.router.weight)
    a, b = x.clone().requires_grad_(), x.double().requires_grad_()
    got, expected = module(a)[0], exact(b)[0]
    # A sum of squares: with a gradient of noise, what all rows share would cancel to almost nothing.
    grad = expected.detach().to(dtype)
    got_grads = torch.autograd.grad(got, [a, *module.parameters()], grad)
    expected_grads = torch.autograd.grad(expected, [b, *exact.parameters()], grad.double())
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 3e-2}[dtype]
    assert relative_error(got, expected) <= tolerance
    names = ["x", *dict(module.named_parameters())]
    errors = {n: relative_error(m, e) for n, m, e in zip(names, got_grads, expected_grads, strict=True)}
    assert max(errors.values()) <= tolerance, errors
