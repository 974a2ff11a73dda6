"""Where core_v0.18 chooses the layers and scales the router losses, on stand-ins for its functions."""

import argparse
import sys
from types import ModuleType, SimpleNamespace

import pytest
from megatron.training.arguments import add_megatron_arguments

from linear_moe.entry import arguments, model_patches
from megatron_patches import PatchError, releases


def config(token_mixer="mom", experts=None):
    return SimpleNamespace(token_mixer=token_mixer, num_moe_experts=experts, mom_num_memories=4)


@pytest.fixture
def core_v018(monkeypatch):
    monkeypatch.setattr(releases, "installed_megatron_core", lambda: "0.18.2")


def around(attribute):
    """What the model patch calls in place of an attribute: a function of the original and its arguments."""
    (target,) = [target for target in model_patches.model_patch().targets if target.attribute == attribute]
    return lambda original, *args, **keywords: target.build(original)(*args, **keywords)


def test_layers_are_chosen_where_the_script_builds_its_model(core_v018, monkeypatch):
    monkeypatch.setattr(
        "linear_moe.layer.decoder_layers.mom_block_spec", lambda config, vp_stage: ("memories", vp_stage)
    )

    def build(config, transformer_layer_spec, vp_stage, **keywords):
        return transformer_layer_spec, keywords

    choose = around("GPTModel")
    chosen = choose(build, config=config(), transformer_layer_spec="softmax", vp_stage=1, seed=7)
    assert chosen == (("memories", 1), {"seed": 7})
    assert choose(build, config("attention"), "softmax") == ("softmax", {})


def test_stacks_of_hybrid_models_are_chosen_in_hybrid_builders(core_v018, monkeypatch):
    monkeypatch.setitem(sys.modules, "hybrid_builders", ModuleType("hybrid_builders"))
    sys.modules["hybrid_builders"].__spec__ = SimpleNamespace()
    monkeypatch.setattr("linear_moe.layer.hybrid_specs.hybrid_stack_spec", lambda config, chosen: ("memories", chosen))
    build = around("HybridModel")
    given = build(lambda config, spec, **keywords: (spec, keywords), config(), hybrid_stack_spec="a script's", seed=7)
    assert given == (("memories", "a script's"), {"seed": 7})
    assert build(lambda config, spec: spec, config("attention"), "a script's") == "a script's"

    def builder(args, pre_process):
        return args.spec

    assert around("hybrid_builder")(builder, SimpleNamespace(spec=None), True)[1] == "hybrid_stack_spec"
    assert around("hybrid_builder")(builder, SimpleNamespace(spec=["mine", "spec"]), True) == ["mine", "spec"]


def test_router_losses_are_scaled_without_experts_too(core_v018):
    def experts_that_are_seen(model, output_tensor, loss_func, config, vp_stage):
        return config.num_moe_experts

    scale = around("forward_step_calc_loss")
    for given, seen in [(config(), 4), (config(experts=8), 8), (config("attention"), None)]:
        before = given.num_moe_experts
        assert scale(experts_that_are_seen, None, None, None, given, None) == seen
        assert given.num_moe_experts == before


def test_the_model_patch_replaces_gpt_builders_instead_of_megatrons_own(core_v018, monkeypatch):
    builders = ModuleType("gpt_builders")
    builders.core_transformer_config_from_args, builders.GPTModel = lambda args: "config", lambda config: "model"
    monkeypatch.setitem(sys.modules, "gpt_builders", builders)
    models = sys.modules.get("megatron.training.models.gpt")
    monkeypatch.setitem(sys.modules, "megatron.training.models.gpt", None)  # core_v0.18 has no such module
    before = dict(vars(builders))
    patch = model_patches.model_patch()
    patch.apply()
    try:
        assert all(getattr(builders, name) is not before[name] for name in before if not name.startswith("__"))
    finally:
        patch.undo()
        monkeypatch.setitem(sys.modules, "megatron.training.models.gpt", models)
    assert vars(builders) == before


def test_without_gpt_builders_the_model_patch_is_refused(core_v018, monkeypatch):
    monkeypatch.setitem(sys.modules, "gpt_builders", None)
    with pytest.raises(PatchError, match="'model' cannot be applied: there is no module gpt_builders; .* 0.18.2 is"):
        model_patches.model_patch().apply()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("moe_router_enable_expert_bias", True, "--moe-router-enable-expert-bias in core_v0.18: .*core_v0.19"),
    ],
)
def test_what_this_release_cannot_do_is_refused(monkeypatch, name, value, message):
    args = add_megatron_arguments(argparse.ArgumentParser()).parse_args([])
    args.token_mixer, args.mom_loss_chunk = "mom", 0
    setattr(args, name, value)
    arguments.check_model(args)
    monkeypatch.setattr(releases, "installed_megatron_core", lambda: "0.18.2")
    with pytest.raises(ValueError, match=message):
        arguments.check_model(args)


def test_arguments_of_later_releases_are_off(core_v018):
    args = add_megatron_arguments(argparse.ArgumentParser()).parse_args([])
    del args.dataloader_inter_document_masking
    args.token_mixer, args.mom_loss_chunk, args.context_parallel_size = "mom", 0, 2
    arguments.check_model(args)
    arguments.check_context_parallel(args)


@pytest.mark.parametrize(
    ("installed", "series", "supported"),
    [("0.19.2", "0.19", True), ("0.18.0", "0.18", True), ("0.99.0", "0.19", False), (None, "0.19", False)],
)
def test_the_release_follows_from_the_version(monkeypatch, installed, series, supported):
    monkeypatch.setattr(releases, "installed_megatron_core", lambda: installed)
    assert releases.running().series == series and releases.is_supported() is supported


def test_older_releases_are_refused_by_every_door(monkeypatch):
    from linear_moe.entry import machine
    from linear_moe.pretrain import check_release

    monkeypatch.setattr(releases, "installed_megatron_core", lambda: "0.17.1")
    with pytest.raises(
        PatchError, match=r"megatron-core 0.17.1 is too old: 0.18 and 0.19 are supported; pip install -U"
    ):
        machine.start()
    for version in ("0.17.1", "0.18.2"):
        monkeypatch.setattr(releases, "installed_megatron_core", lambda version=version: version)
        with pytest.raises(RuntimeError, match=f"needs megatron-core 0.19 or newer, and {version} is installed"):
            check_release()
    for version in ("0.19.0", "0.20.0"):
        monkeypatch.setattr(releases, "installed_megatron_core", lambda version=version: version)
        assert releases.why_too_old() is None
        check_release()
