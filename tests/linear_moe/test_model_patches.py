"""The patches of the launcher: applied once, undone to the same objects, refused by name."""

import ast
from functools import reduce
from importlib import import_module
from pathlib import Path

import pytest
import torch

from linear_moe.entry import machine, model_patches
from megatron_patches import PatchError, applied, dataset_helpers, gradient_norm, patches

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def nothing_left_behind():
    yield
    model_patches.uninstall()
    assert applied() == ()


def stored_targets():
    """Of every target, what its owner holds."""

    def stored(target):
        *path, name = target.attribute.split(".")
        return vars(reduce(getattr, path, import_module(target.module)))[name]

    return {str(target): stored(target) for patch in model_patches.launcher_patches() for target in patch.targets}


def test_uninstall_restores_every_target():
    before = stored_targets()
    model_patches.install(mom=True)
    model_patches.install(mom=True)
    during = stored_targets()
    assert [patch.name for patch in applied()] == [patch.name for patch in model_patches.launcher_patches()]
    model_patches.uninstall()
    # Where Transformer Engine is missing, or lacks no kernel, Megatron keeps its own functions for the gradients' norm.
    kept = set(map(str, gradient_norm.PATCH.targets))
    assert all(during[name] is not value for name, value in before.items() if name not in kept)
    assert stored_targets() == before


def test_without_memories_only_the_arguments_are_added():
    model_patches.install(mom=False)
    assert [patch.name for patch in applied()] == ["arguments"]


def test_a_model_without_memories_is_refused_when_it_is_built():
    from linear_moe.layer.mixer import MomTokenMixer as mixer

    with pytest.raises(RuntimeError, match="--token-mixer: no layer of the model .* has memories; run a script"):
        model_patches.require_memories([torch.nn.Linear(2, 2), torch.nn.ReLU()])
    with_memories = torch.nn.ModuleList([torch.nn.Linear(2, 2), mixer.__new__(mixer)])
    torch.nn.Module.__init__(with_memories[1])
    model_patches.require_memories([torch.nn.Linear(2, 2), with_memories])


def test_a_missing_target_is_named_and_no_patch_is_applied(monkeypatch):
    before = stored_targets()
    monkeypatch.delattr("megatron.training.models.gpt.default_layer_spec")
    with pytest.raises(PatchError, match="'model' cannot be applied: there is no .*gpt.default_layer_spec"):
        model_patches.install(mom=True)
    monkeypatch.undo()
    assert stored_targets() == before


def test_every_patch_has_a_reason_and_an_end():
    assert all(patch.reason and patch.removed_when for patch in model_patches.patches())


def names_in_the_sources(package: str) -> set[str]:
    """Names of all patches that the files of a package make."""
    calls = [
        node
        for file in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Patch"
    ]
    return {word.value.value for call in calls for word in call.keywords if word.arg == "name"}


def test_the_lists_of_patches_have_every_patch_of_their_packages():
    below, ours = names_in_the_sources("megatron_patches"), names_in_the_sources("linear_moe")
    assert len(below) > 10 and {"arguments", "model", "training-log", "console"} <= ours
    assert sorted(patch.name for patch in patches()) == sorted(below)
    assert sorted(patch.name for patch in model_patches.patches()) == sorted(below | ours)


def test_uninstall_undoes_the_patches_of_the_machine_too():
    dataset_helpers.apply()
    model_patches.install(mom=True)
    model_patches.uninstall()
    assert applied() == ()


def test_accelerated_parts_are_found_or_not(monkeypatch):
    monkeypatch.setattr(machine, "_found", lambda module: module == "triton")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    parts = machine.accelerated_parts()
    assert [name for name, detail in parts.items() if detail] == ["Triton"]
    assert set(parts) == {"Transformer Engine", "Triton", "wandb", "CUDA", "Apex"}
