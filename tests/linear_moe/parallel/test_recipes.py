"""The recipes' tiny sizes train, A0.3B over two ranks too, and the sizes of their models are computed right."""

import os

import pytest
import training

from linear_moe import recipes
from linear_moe.recipes import __main__ as door
from linear_moe.recipes.size import memory_a_gpu, size_of

IN_EVERY_RUN = ("linear_moe_a0.3b",)
ALL = bool(os.environ.get("MOM_ALL_RECIPES"))
CHOSEN = recipes.names() if ALL else IN_EVERY_RUN
STEPS = ["--mock-data", "--train-iters"]


def words(name):
    return recipes.read(name, tiny=True).model_words()


@pytest.mark.parametrize("name", CHOSEN)
def test_the_tiny_size_trains_and_has_as_many_parameters_as_computed(name, tmp_path):
    losses = training.launch(1, [*words(name), *STEPS, 8], tmp_path, save_at=(8,))
    assert losses[8] < losses[1] - 0.2
    stored = training.parameters(tmp_path, 8)
    counted = sum(tensor.numel() for key, tensor in stored.items() if not key.endswith("expert_bias"))
    assert counted == size_of(recipes.read(name, tiny=True), vocabulary=128).all


def test_experts_and_memories_over_the_same_ranks_give_the_losses_of_one_process(tmp_path):
    model = words("linear_moe_a0.3b")
    training.launch(1, [*model, *STEPS, 1, "--lr", 0], tmp_path / "start", save_at=(1,))
    start = ["--load", tmp_path / "start", "--finetune", "--no-load-optim", "--no-load-rng"]
    one = training.launch(1, [*model, *STEPS, 6, *start], tmp_path / "one")
    two = training.launch(2, [*model, *STEPS, 6, *start, *training.EP2], tmp_path / "two")
    assert two == pytest.approx(one, rel=1e-5)
    assert "memories: 2 of 4 on each of 2 expert-parallel ranks" in (tmp_path / "two" / "rank_0.txt").read_text()


def test_sizes_are_those_of_the_models_that_the_recipes_follow():
    billions = {name: round(size_of(recipes.read(name)).all / 1e9, 1) for name in recipes.names()}
    assert billions == {
        "deepseek_v2_lite": 16.0, "deepseek_v3": 691.6, "linear_moe_a0.3b": 2.6, "linear_moe_a1b": 7.0,
        "llama3_8b": 9.6, "mixtral_8x7b": 48.3, "qwen3_8b": 10.0, "qwen3_moe_30b_a3b": 30.8,
    }  # fmt: skip
    for name in recipes.names():
        recipe = recipes.read(name)
        size, layout = size_of(recipe), recipe.layout
        assert 0 < size.at_work <= size.all and size.experts + size.memories < size.all
        assert memory_a_gpu(recipe) < 60, name
        split = layout.get("TP", 1) * layout.get("PP", 1)
        assert layout["GPUS"] % (split * layout.get("EP", 1)) == 0
        assert recipe.pattern.split("/")[0].count("|") == layout.get("PP", 1) - 1 or "|" not in recipe.pattern


def test_a_recipe_starts_the_script_with_its_settings(monkeypatch, capsys):
    started = []
    monkeypatch.setattr(door.os, "execvpe", lambda *call: started.append(call))
    monkeypatch.setenv("EP", "2")
    door.main(["linear_moe_a0.3b", "--log-interval", "1"])
    ((program, command, environment),) = started
    assert program == "bash" and command[1].endswith("examples/pretrain_mom_a100.sh")
    assert command[-2:] == ["--log-interval", "1"] and "--hybrid-layer-pattern" in command and "RE" * 12 in command
    assert environment["HIDDEN"] == "1024" and environment["EP"] == "2"  # the user's setting wins
    assert door.main(["linear_moe_a0.4b"]) == 2
    assert "there is no recipe 'linear_moe_a0.4b': use one of deepseek_v2_lite, " in capsys.readouterr().err
