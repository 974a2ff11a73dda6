"""Decoding after a context: the state of memories is constant, the keys and values of softmax attention grow."""

import bench_decode
import pytest
import torch
from timed_rows import PNG, rows_of

from mom_layers.hf import MomCache, MomConfig, MomForCausalLM

WIDTH = 2 * 64 * 4  # bytes of a token's keys and values in a layer: hidden size 64, float32
SOFTMAX = {"layers": [0, 1], "num_heads": 2}


def test_memories_keep_a_constant_state_beside_growing_keys(tmp_path):
    rows = rows_of("bench_decode.py", tmp_path, "--plot", tmp_path / "decode.png")
    assert set(rows[0]) == set(bench_decode.FIELDS)

    def kept(what):
        found = [row for row in rows if row["what"] == what]
        return {(int(r["batch"]), int(r["context"])): int(r["state_bytes_per_sequence"]) for r in found}

    layers = {(1, 64), (1, 256), (2, 64), (2, 256)}
    assert kept("mom-layer").keys() == layers and len(set(kept("mom-layer").values())) == 1
    assert kept("softmax-layer") == {(batch, context): WIDTH * context for batch, context in layers}
    assert kept("mom-model") == {(1, 64): 2 * kept("mom-layer")[1, 64], (1, 256): 2 * kept("mom-layer")[1, 64]}
    assert kept("softmax-model") == {(1, context): 2 * WIDTH * context for context in (64, 256)}
    assert (tmp_path / "decode.png").read_bytes().startswith(PNG)


def test_only_the_first_cases_are_timed(tmp_path):
    rows = rows_of("bench_decode.py", tmp_path, "--cases", 1)
    assert [(row["what"], row["context"]) for row in rows] == [("mom-layer", "64"), ("softmax-layer", "64")]


def test_keys_that_do_not_fit_are_left_out(monkeypatch, capsys):
    monkeypatch.setattr(bench_decode, "device_kind", lambda: "cpu")
    monkeypatch.setattr(bench_decode, "free_bytes", lambda device: WIDTH * 64)
    assert bench_decode.main(["--cases", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[0] for line in lines] == ["mom-layer", "softmax-layer"]
    assert "does not fit" in lines[1] and "does not fit" not in lines[0]


def test_a_case_that_runs_out_of_memory_does_not_end_the_run(monkeypatch, capsys):
    def measure(what, mixer, batch, context, device):
        if mixer == "mom":
            raise torch.OutOfMemoryError
        return 1, 1.0, 1.0, 1024

    monkeypatch.setattr(bench_decode, "device_kind", lambda: "cpu")
    monkeypatch.setattr(bench_decode, "measure", measure)
    assert bench_decode.main(["--cases", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert lines[0].endswith("out of memory") and lines[1].startswith("softmax-layer")


@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_filled_keys_are_attended_to_as_a_real_cache_is(batch):
    """The timed peer computes the outputs of the model after a prefill with the same keys and values."""
    torch.manual_seed(0)
    config = MomConfig(vocab_size=128, attn=SOFTMAX, **bench_decode.SIZES["cpu"])
    model = MomForCausalLM(config).eval()
    tokens = torch.randint(128, (batch, 9))
    prefilled, filled = MomCache(config), MomCache(config)
    model(tokens[:, :8], past_key_values=prefilled)
    filled.layers = [bench_decode.FilledKeys(batch, 9, "cpu") for _ in prefilled.layers]
    for layer, other in zip(filled.layers, prefilled.layers, strict=True):
        layer.keys[:, :, :8], layer.values[:, :, :8] = other.keys, other.values
    for _ in range(2):  # a step replaces the newest key, so that the next step is the same
        got = model(tokens[:, 8:], past_key_values=filled).logits
        torch.testing.assert_close(got, model(tokens).logits[:, 8:])
