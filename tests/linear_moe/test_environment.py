"""Settings from the environment and a file, where the command line has no arguments of ours."""

import pytest

from linear_moe.__main__ import asks_for_mom
from linear_moe.entry.environment import read_settings


def test_the_environment_wins_over_the_file(tmp_path):
    file = tmp_path / "mom.yaml"
    file.write_text("mom_num_memories: 8\nmom-topk: 3\nmom_shared_memory: false\n")
    settings = read_settings({"MOM_CONFIG": str(file), "MOM_NUM_MEMORIES": "6", "MOM_EXPAND_V": "2", "HOME": "/"})
    assert settings == {
        "token_mixer": "mom", "mom_num_memories": 6, "mom_topk": 3, "mom_shared_memory": False, "mom_expand_v": 2.0,
    }  # fmt: skip
    assert read_settings({}) == {"token_mixer": "mom"}


def test_old_names_still_work(tmp_path):
    file = tmp_path / "mom.yaml"
    file.write_text("mom_backend: torch\n")
    assert read_settings({"MOM_CONFIG": str(file)}) == {"token_mixer": "mom", "mom_kernels": "torch"}
    assert read_settings({"MOM_BACKEND": "triton"}) == {"token_mixer": "mom", "mom_kernels": "triton"}
    for name in ("MOM_BACKEND", "MOM_KERNELS"):  # the environment wins over the file, under either name
        assert read_settings({"MOM_CONFIG": str(file), name: "triton"})["mom_kernels"] == "triton"


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"MOM_BACKEND": "torch", "MOM_KERNELS": "torch"},
            "the environment sets mom_kernels and mom_backend, two names of one setting: leave out mom_backend",
        ),
        ({"MOM_BACKEND": "cuda"}, "argument --mom-kernels/--mom-backend: invalid choice: 'cuda'"),
        ({"MOM_NUM_MEMORY": "4"}, "the environment sets mom_num_memory, which does not exist; there are mom_rule, "),
        ({"MOM_RULE": "hebb"}, "argument --mom-rule: invalid choice: 'hebb'"),
        ({"MOM_TOPK": "two"}, "argument --mom-topk: invalid int value: 'two'"),
        ({"MOM_SHARED_MEMORY": "maybe"}, "mom_shared_memory must be true or false, got 'maybe'"),
        ({"MOM_CONFIG": "nowhere.yaml"}, "MOM_CONFIG: there is no file 'nowhere.yaml'"),
    ],
)
def test_refuses_what_the_arguments_would_refuse(environment, message):
    with pytest.raises(ValueError, match=message):
        read_settings(environment)


def test_refuses_a_file_without_names_and_values(tmp_path):
    (tmp_path / "mom.yaml").write_text("- mom_topk\n")
    with pytest.raises(ValueError, match="expected lines such as 'mom_num_memories: 4', got"):
        read_settings({"MOM_CONFIG": str(tmp_path / "mom.yaml")})


@pytest.mark.parametrize(
    ("words", "mom"),
    [
        ("--token-mixer mom", True), ("--lr 1 --token-mixer=mom", True), ("--use-checkpoint-args --load x", True),
        ("--token-mixer attention", False), ("--lr 1", False), ("", False),
    ],
)  # fmt: skip
def test_a_command_line_asks_for_memories_or_does_not(words, mom):
    assert asks_for_mom(words.split()) is mom
