"""Adapters, hooks and offloading act on every projection, take effect, merge and export; modules on which they cannot
act are refused by name."""

import pytest
import torch
from hf_models import HYBRID, random_tokens, relative_error, tiny_model
from safetensors.torch import load_file, save_model

from mom_layers.hf import MomForCausalLM

peft = pytest.importorskip("peft")

NAMES = ["q_proj", "k_proj", "v_proj", "o_proj"]
KINDS = {"all linear layers": "all-linear", "the usual names": NAMES, "gates": ["b_proj", "shared_b", "gate"]}


def adapted(target_modules, **changes):
    """A model with LoRA adapters that are not zero, the tokens, and the model's logits without adapters."""
    model, tokens = tiny_model(**changes).eval(), random_tokens(2, 11)
    with torch.no_grad():
        before = model(tokens).logits
    config = peft.LoraConfig(r=2, target_modules=target_modules, task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return model, tokens, before


@pytest.mark.parametrize("changes", [{}, {"single_kv_proj": True}, {"shared_mem": False}, HYBRID], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_take_effect_merge_and_export(kind, changes, tmp_path):
    targets = KINDS[kind]
    if changes and kind == "gates":  # a model has projections of routed memories, of a shared memory, or both
        targets = ["gate"]
    model, tokens, before = adapted(targets, **changes)
    with torch.no_grad():
        after = model(tokens).logits
    assert not torch.allclose(after, before, atol=1e-3)
    model(tokens, labels=tokens).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if "lora_" in name}
    assert gradients and all(gradient is not None and gradient.any() for gradient in gradients.values())
    merged = model.merge_and_unload()
    assert type(merged) is MomForCausalLM
    with torch.no_grad():
        assert relative_error(merged(tokens).logits, after) < 1e-4
    merged.save_pretrained(tmp_path)
    again = MomForCausalLM.from_pretrained(tmp_path).eval()
    assert again.state_dict().keys() == tiny_model(**changes).state_dict().keys()
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, merged(tokens).logits)


def test_every_memory_has_an_adapter_of_its_own():
    """all-linear reaches every projection of every memory."""
    model, *_ = adapted("all-linear")
    layer = model.base_model.model.model.layers[0].attn
    for letter in "kvba":
        module = getattr(layer, f"{letter}_proj")
        assert isinstance(module, peft.tuners.lora.Linear)
        assert module.lora_B["default"].weight.shape[0] == sum(p.weight.shape[0] for p in module.get_base_layer())
        assert isinstance(getattr(layer, f"shared_{letter}"), peft.tuners.lora.Linear)


@pytest.mark.parametrize("safe", [False, True])
def test_adapters_merge_and_unmerge(safe):
    model, tokens, before = adapted(NAMES)
    with torch.no_grad():
        after = model(tokens).logits
        model.merge_adapter(safe_merge=safe)
        assert relative_error(model(tokens).logits, after) < 1e-4
        model.unmerge_adapter()
        assert relative_error(model(tokens).logits, after) < 1e-4
        with model.disable_adapter():
            assert relative_error(model(tokens).logits, before) < 1e-4


def test_generation_with_adapters_equals_one_forward():
    """Tokens that are generated one by one are the choices of one forward pass, with adapters and after merging."""
    model, tokens, _ = adapted("all-linear")
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    generated = model.generate(tokens, **options)
    with torch.no_grad():
        scores = model(generated[:, :-1]).logits[:, -5:]
    assert torch.equal(scores.argmax(-1), generated[:, -5:])
    assert torch.equal(model.merge_and_unload().generate(tokens, **options), generated)


@pytest.mark.parametrize("name", ["q_conv1d", "k_conv1d", "v_conv1d"])
def test_adapters_on_convolutions_are_refused_by_name(name):
    with pytest.raises(ValueError, match=r"Target module ShortConvolution\(\) is not supported"):
        peft.get_peft_model(tiny_model(), peft.LoraConfig(r=2, target_modules=[name]))


def test_a_wrapped_convolution_is_refused_by_name():
    """The kernels read the convolution's weights, so that a wrapper's computation would have no effect."""
    model = tiny_model()
    model.model.layers[0].attn.v_conv1d = torch.nn.Sequential(model.model.layers[0].attn.v_conv1d)
    message = "v_conv1d is a Sequential: .*Leave q_conv1d, k_conv1d, v_conv1d, text_conv1d and o_norm"
    with pytest.raises(ValueError, match=message):
        model(random_tokens(1, 5))


def test_a_hook_on_a_memorys_projection_takes_effect():
    model, tokens = tiny_model(), random_tokens(1, 7)
    with torch.no_grad():
        before = model(tokens).logits
        handle = model.model.layers[0].attn.v_proj[1].register_forward_hook(lambda module, x, y: 2 * y)
        hooked = model(tokens).logits
        handle.remove()
        assert torch.equal(model(tokens).logits, before)
        model.model.layers[0].attn.v_proj[1].weight.mul_(2)
        assert relative_error(model(tokens).logits, hooked) < 1e-4
        assert not torch.allclose(hooked, before, atol=1e-4)


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_offloaded_layers_compute_the_same(place, tmp_path):
    """accelerate keeps a layer's weights elsewhere, and loads them for every call of a module."""
    from accelerate import cpu_offload, disk_offload

    model, tokens = tiny_model().eval(), random_tokens(2, 9)
    with torch.no_grad():
        expected = model(tokens).logits
    if place == "cpu":
        cpu_offload(model, execution_device="cpu")
    else:
        disk_offload(model, tmp_path / "offloaded", execution_device="cpu")
    assert model.model.layers[0].attn.k_proj[0].weight.device.type == "meta"
    with torch.no_grad():
        assert relative_error(model(tokens).logits, expected) < 1e-4
    generated = model.generate(tokens, max_new_tokens=3, do_sample=False)
    assert generated.shape == (2, 12)


def test_a_device_map_with_layers_on_the_disk(tmp_path):
    model, tokens = tiny_model().eval(), random_tokens(2, 9)
    model.save_pretrained(tmp_path / "export")
    places = {"model.embeddings": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
              "lm_head": "cpu"}  # fmt: skip
    loaded = MomForCausalLM.from_pretrained(
        tmp_path / "export", device_map=places, offload_folder=tmp_path / "offloaded"
    )
    with torch.no_grad():
        assert relative_error(loaded(tokens).logits, model(tokens).logits) < 1e-4


def test_weights_can_be_saved_after_an_evaluation(tmp_path):
    """Evaluation lays a layer's weights side by side; each weight keeps its own storage, as safetensors requires."""
    model, tokens = tiny_model().eval(), random_tokens(1, 7)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.inference_mode():
        model(tokens)
    with torch.no_grad():
        model(tokens)
    save_model(model, tmp_path / "model.safetensors")
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == before.keys() and all(torch.equal(saved[name], before[name]) for name in saved)
