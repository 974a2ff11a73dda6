"""The patches of the launcher: applied once, undone to the same objects, refused by name."""

from functools import reduce
from importlib import import_module

import pytest

from linear_moe.entry import machine, plugin
from megatron_patches import PatchError, applied


@pytest.fixture(autouse=True)
def nothing_left_behind():
    yield
    plugin.uninstall()
    assert applied() == ()


def stored_targets():
    """Of every target, what its owner holds."""

    def stored(target):
        *path, name = target.attribute.split(".")
        return vars(reduce(getattr, path, import_module(target.module)))[name]

    return {str(target): stored(target) for patch in plugin.patches() for target in patch.targets}


def test_uninstall_restores_every_target():
    before = stored_targets()
    plugin.install(mom=True)
    plugin.install(mom=True)
    during = stored_targets()
    assert [patch.name for patch in applied()] == [patch.name for patch in plugin.patches()]
    plugin.uninstall()
    assert all(during[name] is not value for name, value in before.items())
    assert stored_targets() == before


def test_without_memories_only_the_arguments_are_added():
    plugin.install(mom=False)
    assert [patch.name for patch in applied()] == ["arguments"]


def test_a_missing_target_is_named_and_nothing_is_changed(monkeypatch):
    before = stored_targets()
    monkeypatch.delattr("megatron.training.models.gpt.default_layer_spec")
    with pytest.raises(PatchError, match="'model' cannot be applied: there is no .*gpt.default_layer_spec"):
        plugin.install(mom=True)
    monkeypatch.undo()
    assert stored_targets() == before


def test_twelve_patches_on_a_machine_with_gpus():
    assert len(plugin.patches()) <= 12
    assert all(patch.reason and patch.removed_when for patch in plugin.patches())


def test_accelerated_parts_are_found_or_not(monkeypatch):
    monkeypatch.setattr(machine, "_found", lambda module: module == "triton")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    parts = machine.accelerated_parts()
    assert [name for name, detail in parts.items() if detail] == ["Triton"]
    assert set(parts) == {"Transformer Engine", "Triton", "wandb", "CUDA", "Apex"}
