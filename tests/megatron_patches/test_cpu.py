"""Megatron's own GPT trains on the CPU, and gives the same losses on every layout and after a restart."""

from functools import reduce
from importlib import import_module

import pytest
import torch
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from stock_gpt import launch

from megatron_patches import PatchError, applied, cpu, patches
from megatron_patches.adam import FusedAdam

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
DISTRIBUTED_OPTIMIZER = "--use-distributed-optimizer"


@pytest.fixture
def patched():
    cpu.apply()
    yield
    cpu.undo()


def stored_targets():
    """Of every target, whether its owner holds it itself, and what it holds."""

    def stored(target):
        *path, name = target.attribute.split(".")
        owner = reduce(getattr, path, import_module(target.module))
        return name in vars(owner), vars(owner).get(name, getattr(owner, name))

    return {str(target): stored(target) for patch in cpu.PATCHES for target in patch.targets}


def test_undo_restores_every_target():
    before = stored_targets()
    cpu.apply()
    during = stored_targets()
    cpu.undo()
    after = stored_targets()
    for name, (own, value) in before.items():
        # Without Transformer Engine some attributes have the replacement's value already.
        assert during[name][1] is not value or value in (None, True, False, WrappedTorchNorm), name
        assert after[name][0] == own and after[name][1] is value, name


def test_a_missing_symbol_leaves_torch_as_it_was(monkeypatch):
    before = stored_targets()
    monkeypatch.delattr("megatron.core.tensor_parallel.random._set_cuda_rng_state")
    with pytest.raises(PatchError, match="'cpu-random'.*random._set_cuda_rng_state"):
        cpu.apply()
    monkeypatch.undo()
    assert applied() == () and stored_targets() == before


def test_a_machine_with_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "a GPU")
    with pytest.raises(RuntimeError, match="this machine has a GPU: train on the GPU"):
        cpu.apply()
    assert applied() == ()


def test_every_patch_says_why():
    assert len({patch.name for patch in patches()}) == len(patches())
    assert all(patch.reason and patch.removed_when and patch.targets for patch in patches())


def test_tensors_asked_for_on_cuda_are_on_the_cpu(patched):
    assert torch.zeros(2, device="cuda").device == torch.empty_like(torch.ones(2), device="cuda:0").device == cpu._CPU
    assert torch.empty(2, pin_memory=True, device=torch.cuda.current_device()).device == cpu._CPU
    assert torch.nn.Linear(2, 2).cuda().weight.device == cpu._CPU
    with torch.device("meta"):
        assert torch.zeros(2).device == torch.nn.Linear(2, 2).weight.device == torch.device("meta")


def test_random_states_fork_and_nest(patched):
    tracker = import_module("megatron.core.tensor_parallel.random").CudaRNGStatesTracker()
    torch.manual_seed(1)
    tracker.add("left", 2)
    tracker.add("right", 3)
    outside, left, right = [], [], []
    for _ in range(2):
        outside.append(torch.rand(2))
        with tracker.fork("left"):
            left.append(torch.rand(2))
            with tracker.fork("right"):
                right.append(torch.rand(2))
            left.append(torch.rand(2))
    for seed, numbers in ((1, outside), (2, left), (3, right)):
        expected = torch.rand(2 * len(numbers), generator=torch.Generator().manual_seed(seed))
        assert torch.equal(torch.cat(numbers), expected)


@pytest.mark.parametrize(("adam_w_mode", "expected"), [(True, torch.optim.AdamW), (False, torch.optim.Adam)])
def test_fused_adam_is_adam(adam_w_mode, expected):
    torch.manual_seed(0)
    ours, theirs = ([torch.nn.Parameter(torch.arange(5.0)), torch.nn.Parameter(torch.ones(3))] for _ in range(2))
    settings = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.3}
    fused, torch_adam = FusedAdam(ours, adam_w_mode=adam_w_mode, **settings), expected(theirs, **settings)
    for step in range(4):
        if step == 2:
            saved = fused.state_dict()
            fused = FusedAdam(ours, adam_w_mode=adam_w_mode, **settings)
            fused.load_state_dict(saved)
        for our_param, their_param in zip(ours, theirs, strict=True):
            our_param.grad = their_param.grad = torch.randn_like(our_param)
        fused.step()
        torch_adam.step()
    assert fused.param_groups[0]["step"] == 4
    assert all(torch.equal(our_param, their_param) for our_param, their_param in zip(ours, theirs, strict=True))


@pytest.fixture(scope="module")
def losses(tmp_path_factory):
    """One process, with a checkpoint after two of four iterations."""
    folder = tmp_path_factory.mktemp("one_process")
    checkpoint = str(folder / "checkpoint")
    arguments = [DISTRIBUTED_OPTIMIZER, "--save", checkpoint, "--save-interval", "2"]
    return launch(1, arguments, folder), checkpoint


def test_training_lowers_the_loss(losses):
    expected, _ = losses
    assert len(expected) == 4 and expected[-1] < expected[0] - 0.1


def test_resuming_continues_with_the_same_losses(losses, tmp_path):
    expected, checkpoint = losses
    resumed = launch(1, [DISTRIBUTED_OPTIMIZER, "--load", checkpoint, "--ckpt-step", "2"], tmp_path)
    assert resumed == expected[2:]


@pytest.mark.parametrize(
    "layout",
    [
        [DISTRIBUTED_OPTIMIZER, "--overlap-grad-reduce", "--overlap-param-gather"],
        ["--tensor-model-parallel-size", "2"],
    ],
    ids=["data parallel", "tensor parallel"],
)
def test_two_processes_give_the_losses_of_one(losses, tmp_path, layout):
    expected, _ = losses
    assert launch(2, layout, tmp_path) == pytest.approx(expected, rel=1e-5)


DROPOUT = ["--hidden-dropout", "0.1", "--attention-dropout", "0.1"]


def test_resuming_continues_with_the_same_dropout(tmp_path):
    checkpoint = str(tmp_path / "checkpoint")
    expected = launch(1, [*DROPOUT, "--save", checkpoint, "--save-interval", "2"], tmp_path)
    assert launch(1, [*DROPOUT, "--load", checkpoint, "--ckpt-step", "2"], tmp_path) == expected[2:]


def test_a_data_loader_leaves_the_dropouts_generator_alone(patched):
    torch.manual_seed(3)
    state = torch.get_rng_state()
    orders = [list(torch.utils.data.DataLoader(range(20), batch_size=None, shuffle=True)) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert orders[0] == orders[1] and sorted(orders[0]) == list(range(20)) != orders[0]
    loader = torch.utils.data.DataLoader(range(20), batch_size=None, shuffle=True)
    assert list(loader) != list(loader)
    mine = torch.Generator()
    assert torch.utils.data.DataLoader(range(20), generator=mine).generator is mine


def test_recomputation_repeats_the_dropout(tmp_path):
    dropout = [*DROPOUT, "--train-iters", "2"]
    recomputation = ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"]
    assert launch(1, dropout + recomputation, tmp_path) == launch(1, dropout, tmp_path)
