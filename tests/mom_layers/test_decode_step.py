"""One token at a time in place, against the general path in float64."""

import copy

import pytest
import torch
from comparison import TOLERANCE, inputs, layer, relative_error

from mom_layers import layer as mom


def prefilled(batch, dtype, kernels, steps=2, **settings):
    """A layer, its state after 7 tokens and the tokens that follow; and the same in float64, for the general path."""
    settings = {"num_heads": 2, "num_memories": 4, "topk": 2} | settings
    module = layer(dtype, kernels=kernels, **settings)
    exact = layer(torch.float64, kernels="torch", **settings)
    exact.load_state_dict(module.state_dict())
    x = inputs(batch, 7 + steps, dtype=dtype).detach()
    with torch.no_grad():
        exact_state = exact(x[:, :7].double(), output_state=True)[1]
    state = copy.deepcopy(exact_state)
    state.recurrent = state.recurrent.float()
    for name in ("q_tail", "k_tail", "v_tail"):
        setattr(state, name, getattr(state, name).to(dtype))
    return module, state, exact, exact_state, x[:, 7:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "settings",
    [
        {}, {"shared_memory": False}, {"topk": 1}, {"num_memories": 1, "topk": 1}, {"num_memories": 12, "topk": 3},
        {"single_kv_proj": True}, {"expand_v": 2.0}, {"conv_kernel": 2}, {"rule": "gla"},
    ],
    ids=str,
)  # fmt: skip
def test_steps_agree(settings, dtype):
    module, state, exact, exact_state, tokens = prefilled(3, dtype, "triton", **settings)
    with torch.no_grad():
        for t in range(tokens.shape[1]):
            got = module.step(tokens[:, t], state)
            expected, exact_state = exact(tokens[:, t : t + 1].double(), state=exact_state, output_state=True)
            assert got.dtype == dtype and got.shape == (3, module.hidden_size)
            assert relative_error(got, expected[:, 0]) <= TOLERANCE[dtype]
    for name in ("recurrent", "q_tail", "k_tail", "v_tail"):
        assert relative_error(getattr(state, name), getattr(exact_state, name)) <= TOLERANCE[dtype], name


@pytest.mark.parametrize("kernels,rule", [("torch", "gated_deltanet"), ("triton", "gla")])
def test_the_general_path_steps_in_place_too(kernels, rule):
    module, state, exact, exact_state, tokens = prefilled(3, torch.float32, kernels, steps=1, rule=rule)
    places = [getattr(state, name).data_ptr() for name in ("recurrent", "q_tail", "k_tail", "v_tail")]
    got = module.step(tokens[:, 0], state)
    expected, exact_state = exact(tokens.double(), state=exact_state, output_state=True)
    assert relative_error(got, expected[:, 0]) <= 1e-5
    assert relative_error(state.recurrent, exact_state.recurrent) <= 1e-5
    assert places == [getattr(state, name).data_ptr() for name in ("recurrent", "q_tail", "k_tail", "v_tail")]


@pytest.mark.parametrize("settings", [{}, {"num_memories": 1, "topk": 1, "shared_memory": False}], ids=str)
def test_one_sequence(settings):
    module, state, exact, exact_state, tokens = prefilled(1, torch.float32, "triton", steps=1, **settings)
    expected, _ = exact(tokens.double(), state=exact_state, output_state=True)
    assert relative_error(module.step(tokens[:, 0], state), expected[:, 0]) <= 1e-5


def test_memories_that_are_not_chosen_stay_as_they_are():
    module, state, *_, tokens = prefilled(2, torch.float32, "triton", steps=1)
    before = copy.deepcopy(state)
    chosen = module.router(tokens[:, 0]).topk(module.topk).indices
    module.step(tokens[:, 0], state)
    for sequence in range(2):
        for memory in range(module.num_memories + 1):
            touched = memory == module.num_memories or memory in chosen[sequence]
            for name in ("recurrent", "q_tail", "k_tail", "v_tail"):
                same = torch.equal(getattr(state, name)[sequence, memory], getattr(before, name)[sequence, memory])
                assert same != touched, (sequence, memory, name)


def test_a_slice_of_a_larger_state_is_changed_in_place():
    module, state, exact, exact_state, tokens = prefilled(3, torch.float32, "triton", steps=1)
    expected, exact_state = exact(tokens.double(), state=exact_state, output_state=True)
    for name in ("recurrent", "q_tail", "k_tail", "v_tail"):
        part = getattr(state, name)
        larger = part.new_zeros(2 * part.shape[0], *part.shape[1:])[::2]
        setattr(state, name, larger.copy_(part))
    assert relative_error(module.step(tokens[:, 0], state), expected[:, 0]) <= 1e-5
    assert relative_error(state.recurrent, exact_state.recurrent) <= 1e-5


def test_a_state_whose_tensors_place_sequences_differently_is_refused():
    module, state, *_, tokens = prefilled(2, torch.float32, "triton", steps=1)
    state.q_tail, others = state.q_tail.contiguous(), state.q_tail.stride()
    assert state.q_tail.stride() != others
    with pytest.raises(ValueError, match=r"place sequences and memories alike, .* got strides \[\("):
        module.step(tokens[:, 0], state)


def test_refuses_bad_inputs():
    module, state, *_, tokens = prefilled(2, torch.float32, "torch", steps=1)
    with pytest.raises(ValueError, match=r"x must be \[B, 32\], got \[2, 1, 32\]"):
        module.step(tokens, state)
    with pytest.raises(ValueError, match="the state holds 2 sequences, the input 1"):
        module.step(tokens[:1, 0], state)


@pytest.mark.gpu
def test_a_cuda_graph_holds_the_step():
    module = mom.MixtureOfMemories(512, num_heads=4, head_dim=128).to("cuda", torch.bfloat16)
    x = torch.randn(2, 20, 512, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        state = module(x[:, :10], output_state=True)[1]
    expected_state = copy.deepcopy(state)
    token = torch.empty_like(x[:, 0])
    warm = copy.deepcopy(state)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        token.copy_(x[:, 10])
        module.step(token, warm)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = module.step(token, state)
    for t in range(10, 20):
        token.copy_(x[:, t])
        graph.replay()
        with torch.no_grad():
            expected, expected_state = module(x[:, t : t + 1], state=expected_state, output_state=True)
        assert relative_error(out, expected[:, 0]) <= 1e-2
    assert relative_error(state.recurrent, expected_state.recurrent) <= 1e-2
