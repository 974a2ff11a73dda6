import pytest
import torch
import torch.nn.functional as F
from hf_models import HYBRID, WINDOWED, random_tokens, reference_logits, relative_error, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from mom_layers.hf import MomForCausalLM
from mom_layers.hf.sequence import TokenSequence

# routed memories, routed memories that a token goes to, whether there is a shared memory
MEMORIES = [(m, k, shared) for m in (1, 2, 4, 8) for k in (1, 2) for shared in (True, False) if k <= m]
KINDS = [{}, {"single_kv_proj": True}, {"single_kv_proj": True, "shared_mem": False}, HYBRID, WINDOWED]
KINDS += [{"text_conv_size": 4}]


@pytest.mark.parametrize(("memories", "topk", "shared"), MEMORIES)
def test_logits_equal_the_plain_loops(memories, topk, shared):
    changes = {"num_memories": memories, "topk": topk, "shared_mem": shared}
    check_logits(changes)


@pytest.mark.parametrize("changes", [*KINDS, {"tie_word_embeddings": True, "expand_v": 1}], ids=str)
def test_logits_of_other_kinds_equal_the_plain_loops(changes):
    check_logits(changes)


def check_logits(changes):
    tokens = random_tokens(1, 66)
    model = tiny_model(**changes)
    parameters = {name: value.double() for name, value in model.state_dict().items()}
    expected = reference_logits(parameters, model.config, tokens[0])
    with torch.no_grad():
        assert relative_error(model(tokens).logits[0], expected) < 1e-5
        assert relative_error(model.double()(tokens).logits[0], expected) < 1e-12


@pytest.mark.parametrize("changes", [{}, {"single_kv_proj": True}, HYBRID], ids=str)
def test_gradients_equal_the_plain_loops(changes):
    tokens = random_tokens(1, 21)
    model = tiny_model(dtype=torch.float64, **changes)
    with torch.no_grad():
        model(tokens)  # lays the memories' matrices together, as an evaluation between training steps does
    weights = dict(model.named_parameters())
    target = torch.randn(21, model.config.vocab_size, dtype=torch.float64)
    reference = reference_logits(weights, model.config, tokens[0])
    expected = torch.autograd.grad((reference * target).sum(), weights.values())
    actual = torch.autograd.grad((model(tokens).logits[0] * target).sum(), weights.values())
    for name, a, e in zip(weights, actual, expected, strict=True):
        assert relative_error(a, e) < 1e-9, name


def test_loss_and_balancing_loss():
    tokens = random_tokens(2, 30)
    model = tiny_model()
    plain = model(tokens, labels=tokens)
    cross_entropy = F.cross_entropy(plain.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(plain.loss, cross_entropy)
    assert plain.aux_loss is None and plain.router_logits is None

    model.train()
    out = model(tokens, labels=tokens)
    losses = []
    for logits in out.router_logits:
        assert logits.shape == (60, 4)
        probabilities = logits.softmax(-1)
        share = F.one_hot(probabilities.topk(2).indices, 4).float().mean(0).sum(0)
        losses.append(4 * (share * probabilities.mean(0)).sum())
    torch.testing.assert_close(out.aux_loss, torch.stack(losses).mean())
    torch.testing.assert_close(out.loss, cross_entropy + 0.01 * out.aux_loss)
    out.aux_loss.backward()
    assert model.model.layers[0].attn.gate.weight.grad.norm() > 0

    model.config.use_layer_wise_balance = False
    together = model(tokens).aux_loss
    probabilities = torch.cat(out.router_logits).softmax(-1)
    share = F.one_hot(probabilities.topk(2).indices, 4).float().mean(0).sum(0)
    torch.testing.assert_close(together, 4 * (share * probabilities.mean(0)).sum())


@pytest.mark.parametrize("changes", [{}, HYBRID, WINDOWED], ids=str)
def test_padding_changes_nothing(changes):
    """Padding on the right and on the left changes no output, loss, balancing loss or gradient."""
    tokens = random_tokens(1, 20)
    model = tiny_model(dtype=torch.float64, **changes).train()
    labels_of_tokens = torch.cat([torch.tensor([[-100]]), tokens[:, 1:]], dim=1)  # no token precedes the first
    plain = model(tokens, labels=labels_of_tokens, output_router_logits=True)
    expected = torch.autograd.grad(plain.loss, model.parameters())
    for left, right in ((0, 7), (7, 0), (3, 4)):
        padded, mask = F.pad(tokens, (left, right)), F.pad(torch.ones_like(tokens), (left, right))
        labels = F.pad(labels_of_tokens, (left, right), value=-100)
        out = model(padded, attention_mask=mask, labels=labels, output_router_logits=True)
        torch.testing.assert_close(out.logits[:, left : left + 20], plain.logits)
        torch.testing.assert_close(out.loss, plain.loss)
        torch.testing.assert_close(out.aux_loss, plain.aux_loss)
        for actual, e in zip(torch.autograd.grad(out.loss, model.parameters()), expected, strict=True):
            assert relative_error(actual, e) < 1e-9


@pytest.mark.parametrize("changes", [{}, HYBRID, WINDOWED], ids=str)
@pytest.mark.parametrize("name", ["cu_seqlens", "cu_seq_lens_q"])
def test_nothing_crosses_the_borders_of_packed_documents(changes, name):
    model = tiny_model(**changes)
    documents = [random_tokens(1, length, seed=length) for length in (9, 1, 17)]
    with torch.no_grad():
        expected = torch.cat([model(document).logits for document in documents], dim=1)
        packed = model(torch.cat(documents, dim=1), **{name: torch.tensor([0, 9, 10, 27])}).logits
    torch.testing.assert_close(packed, expected)


@pytest.mark.parametrize("changes", [{}, HYBRID], ids=str)
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(changes, reentrant):
    tokens = random_tokens(2, 12)
    model = tiny_model(dtype=torch.float64, **changes).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected)


def test_outputs_that_are_asked_for():
    tokens = random_tokens(2, 6)
    model = tiny_model(**HYBRID)
    out = model(tokens, output_hidden_states=True, output_router_logits=True)
    assert [h.shape for h in out.hidden_states] == [(2, 6, 32)] * 3
    assert [r.shape for r in out.router_logits] == [(12, 4)]
    torch.testing.assert_close(model(tokens, logits_to_keep=2).logits, out.logits[:, -2:])
    torch.testing.assert_close(model(tokens, logits_to_keep=torch.tensor([0, 3])).logits, out.logits[:, [0, 3]])
    torch.testing.assert_close(model(tokens, return_dict=False, use_cache=False)[0], out.logits)
    torch.testing.assert_close(model(inputs_embeds=model.model.embeddings(tokens)).logits, out.logits)


def test_wrong_arguments_are_refused():
    model, tokens = tiny_model(), random_tokens(1, 4)
    cases = [
        (dict(), "either input_ids or inputs_embeds"),
        (dict(input_ids=tokens, output_attentions=True), "no attention weights"),
        (dict(input_ids=tokens, past_key_values=object()), "must be a MomCache, got object"),
        (dict(input_ids=tokens, attention_mask=torch.ones(1, 5)), r"must be \[1, 4\] .*got \[1, 5\]"),
        (dict(input_ids=random_tokens(2, 4), cu_seqlens=torch.tensor([0, 4])), "end at 8, got"),
        (dict(input_ids=tokens[:, :0]), "at least one token"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            model(**arguments)


@pytest.mark.parametrize("cast", [lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.to(torch.bfloat16)])
def test_decay_parameters_stay_in_float32(cast):
    model = tiny_model()
    before = {name: value.clone() for name, value in model.named_parameters() if name.endswith(("A_log", "dt_bias"))}
    model = cast(model)
    after = dict(model.named_parameters())
    assert before and all(torch.equal(after[name], value) for name, value in before.items())
    assert after["model.layers.0.attn.q_proj.weight"].dtype in (torch.bfloat16, torch.float16)
    assert model(random_tokens(1, 5)).logits.dtype == after["lm_head.weight"].dtype


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True, **HYBRID}], ids=str)
def test_saved_models_load_bit_for_bit(tmp_path, changes):
    model = tiny_model(dtype=torch.bfloat16, **changes)
    tokens = random_tokens(1, 9)
    with torch.no_grad():
        expected = model(tokens).logits
    model.save_pretrained(tmp_path)
    for dtype in ("auto", torch.bfloat16):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        assert type(loaded) is MomForCausalLM and not loaded.training
        for name, value in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value), name
            assert loaded.state_dict()[name].dtype == value.dtype
        with torch.no_grad():
            assert torch.equal(loaded(tokens).logits, expected)
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == loaded.config.to_dict()


def test_memory_matrices_are_copied_once_outside_training():
    model, tokens = tiny_model(), random_tokens(1, 5)
    mixer = model.model.layers[0].attn
    with torch.inference_mode():
        model(tokens)
        first = mixer.projection(torch.float32)
        assert mixer.projection(torch.float32).data_ptr() == first.data_ptr() == mixer.k_proj[0].weight.data_ptr()
    assert first.shape == (5, 2 * 8 + 2 * 16 + 2 + 2, 32)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()(tokens, labels=tokens).loss.backward()
    optimizer.step()
    expected = reference_logits(model.state_dict(), model.config, tokens[0])
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(tokens).logits[0], expected, rtol=1e-4, atol=1e-5)
        mixer.v_proj[2].weight = torch.nn.Parameter(torch.zeros(32, 32))  # replaced, as loaders do
        expected = reference_logits(model.state_dict(), model.config, tokens[0])
        torch.testing.assert_close(model(tokens).logits[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, HYBRID], ids=str)
def test_autocast(changes):
    tokens = random_tokens(2, 20)
    model = tiny_model(**changes).train()
    exact = model(tokens, labels=tokens)
    expected = torch.autograd.grad(exact.loss, model.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        out = model(tokens, labels=tokens)
    assert out.logits.dtype == torch.bfloat16 and relative_error(out.logits, exact.logits) < 0.05
    actual = torch.autograd.grad(out.loss, model.parameters())
    assert {gradient.dtype for gradient in actual} == {torch.float32}
    assert relative_error(*(torch.cat([g.flatten() for g in gradients]) for gradients in (actual, expected))) < 0.1


def test_what_layers_share_moves_between_devices():
    sequence = TokenSequence(2, 3, 1, torch.device("cpu"), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]))
    assert sequence.to("cpu") is sequence
    sequence.attention_mask(4, None)
    moved = sequence.to("meta", non_blocking=True)
    for tensor in (moved.cu_seqlens, moved.token_mask, moved.positions(), moved.attention_mask(4, None)):
        assert tensor.device.type == "meta"
    assert sequence.attention_mask(4, None).device.type == "cpu"
