"""A layer with a convolution over the text before the router: equal to the plain reference, in pieces, while decoding,
with packed documents and with padding."""

import pytest
import torch
from comparison import DEVICE, TOLERANCE, inputs, layer, relative_error
from test_mixture_of_memories import KERNELS, assert_agrees

from mom_layers import LinearAttentionLayer, MixtureOfMemories


@pytest.mark.parametrize("kernels,dtype", KERNELS)
@pytest.mark.parametrize("width", [2, 4])
def test_agrees_with_the_reference(width, kernels, dtype):
    module, x = layer(dtype, kernels=kernels, text_conv=width), inputs(2, 35 if kernels == "torch" else 7, dtype=dtype)
    assert_agrees(module, x, dtype, kernels)


@pytest.mark.parametrize("kernels,dtype", KERNELS)
def test_packed_documents_agree(kernels, dtype):
    cu_seqlens = torch.tensor([0, 5, 5, 6, 70, 90] if kernels == "torch" else [0, 5, 5, 6, 12], dtype=torch.int32)
    module, x = layer(dtype, kernels=kernels, text_conv=4), inputs(1, int(cu_seqlens[-1]), dtype=dtype)
    assert_agrees(module, x, dtype, kernels, cu_seqlens)


@pytest.mark.parametrize("kernels,dtype", KERNELS)
def test_neighbours_in_the_text_reach_a_memory_that_they_did_not_choose(kernels, dtype):
    """Without the shared memory, a token's output depends on the tokens right before the token, whatever they chose."""
    module = layer(dtype, num_memories=4, topk=1, shared_memory=False, kernels=kernels, text_conv=3)
    x = inputs(1, 12, dtype=dtype)
    (grad,) = torch.autograd.grad(module(x)[0][0, -1].square().sum(), x)
    assert (grad[0, -3:].abs().sum(1) > 0).all()


@pytest.mark.parametrize("kernels,dtype", KERNELS)
def test_pieces_and_decoding_equal_the_whole(kernels, dtype):
    lengths = [1, 1, 2, 20, 1] if kernels == "torch" else [1, 4, 1]
    module = layer(dtype, kernels=kernels, text_conv=4)
    x = inputs(3, sum(lengths), dtype=dtype)
    with torch.no_grad():
        whole, whole_state = module(x, output_state=True)
        pieces, state, first = [], None, 0
        for length in lengths:
            y, state = module(x[:, first : first + length], state=state, output_state=True)
            pieces.append(y)
            first += length
        _, stepped = module(x[:, :-1], output_state=True)
        last = module.step(x[:, -1], stepped)
    assert relative_error(torch.cat(pieces, 1), whole) <= TOLERANCE[dtype]
    assert relative_error(last, whole[:, -1]) <= TOLERANCE[dtype]
    for name in ("recurrent", "q_tail", "k_tail", "v_tail", "text_tail"):
        assert relative_error(getattr(state, name), getattr(whole_state, name)) <= TOLERANCE[dtype], name
        assert relative_error(getattr(stepped, name), getattr(whole_state, name)) <= TOLERANCE[dtype], name
    chosen = state.select(torch.tensor([2, 2, 0], device=DEVICE))
    assert torch.equal(chosen.text_tail[1], state.text_tail[2]) and chosen.nbytes == state.nbytes


@pytest.mark.parametrize("kernels,dtype", KERNELS)
def test_padding_reaches_nothing(kernels, dtype):
    length = 12 if kernels == "torch" else 7
    module, x = layer(dtype, kernels=kernels, text_conv=4), inputs(2, length, dtype=dtype)
    mask = torch.ones(2, length, dtype=torch.bool, device=DEVICE)
    mask[0, :4] = False
    mask[1, -2:] = False
    with torch.no_grad():
        padded, padded_state = module(x, token_mask=mask, output_state=True)
        for row, here in [(0, slice(4, None)), (1, slice(0, -2))]:
            alone, state = module(x[row : row + 1, here], output_state=True)
            assert relative_error(padded[row, here], alone[0]) <= TOLERANCE[dtype]
            assert relative_error(padded_state.text_tail[row], state.text_tail[0]) <= TOLERANCE[dtype]
    assert padded[~mask].abs().max() == 0


@pytest.mark.parametrize("width", [1, 9, -1])
def test_refuses_a_width_that_no_kernel_takes(width):
    with pytest.raises(ValueError, match=f"text_conv must be 0 .no convolution over the text. or 2 to 8, got {width}"):
        MixtureOfMemories(32, num_heads=2, head_dim=16, text_conv=width)


def test_a_layer_of_one_memory_has_none():
    with pytest.raises(TypeError, match="a layer of one memory has no text_conv"):
        LinearAttentionLayer(32, num_heads=2, head_dim=16, text_conv=4)
