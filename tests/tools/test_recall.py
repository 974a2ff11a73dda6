"""Multi-query associative recall: the data, the models, the matched baselines, and training many models at once."""

from dataclasses import replace

import pytest
import torch

from linear_moe.recall import baselines, training
from linear_moe.recall.models import SOFTMAX, Mixer, RecallModel, Shape, count_parameters, rotate
from linear_moe.recall.task import BLANK, HELD_OUT_SEED, Sampler, Task
from linear_moe.recall.training import Job, OutOfTime, Settings, TrainedModel, Training, is_flat, train_group

CPU = torch.device("cpu")
TASK = Task(vocabulary=32, length=16, pairs=(2, 4), batch=16)
SHAPE = Shape(layers=2, hidden=32)
SETTINGS = Settings(TASK, SHAPE, Training(steps=8, evaluations=8))
GDN, SOFT = Mixer(), Mixer(SOFTMAX, 2, 16, 16)
MOM = Mixer(memories=4, topk=2)
TEXT_MOM = replace(MOM, text_conv=4)


def quiet(line):
    pass


# --- the data


@pytest.mark.parametrize("task", [TASK, Task(vocabulary=64, length=32, pairs=(1, 3, 8), batch=12)])
def test_sequences_are_pairs_then_blanks_and_every_key_once_more(task):
    sampler = Sampler(task, CPU, 3)
    batch = sampler.draw()
    half, share = task.vocabulary // 2, task.batch // len(task.pairs)
    assert batch.tokens.shape == (task.batch, task.length)
    assert len(batch.queries) == len(batch.targets) == share * sum(task.pairs)
    place = 0
    for b, row in enumerate(batch.tokens.tolist()):
        pairs = task.pairs[b // share]
        keys, values = row[: 2 * pairs : 2], row[1 : 2 * pairs : 2]
        assert len(set(keys)) == len(set(values)) == pairs
        assert all(0 < key < half for key in keys) and all(half <= value < task.vocabulary for value in values)
        rest = row[2 * pairs :]
        assert sorted(token for token in rest if token != BLANK) == sorted(keys)
        asked = batch.queries[place : place + pairs].tolist()
        assert all(query // task.length == b for query in asked)
        answers = {row[query % task.length]: int(batch.targets[place + i]) for i, query in enumerate(asked)}
        assert answers == dict(zip(keys, values, strict=True))
        assert all((query % task.length - 2 * pairs) % 2 == 0 for query in asked)
        kinds = sampler.pairs_of_query[place : place + pairs]
        assert (kinds == task.pairs.index(pairs)).all()
        place += pairs


def test_short_gaps_are_the_most_frequent_as_a_power_law_has_them():
    task = Task(vocabulary=32, length=64, pairs=(1,), batch=2000)
    gaps = (Sampler(task, CPU, 0).draw().queries % task.length - 2) // 2
    share = torch.bincount(gaps, minlength=31) / len(gaps)
    expected = torch.arange(1, 32.0) ** (0.01 - 1)
    torch.testing.assert_close(share, expected / expected.sum(), atol=0.04, rtol=0)


def test_a_seed_decides_the_batches_and_held_out_sequences_are_others():
    first, again, other = (Sampler(TASK, CPU, seed) for seed in (5, 5, HELD_OUT_SEED + 5))
    a, b, c = first.draw(), again.draw(), other.draw()
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not torch.equal(a.tokens, c.tokens)
    first.fill(a)
    assert all(torch.equal(x, y) for x, y in zip(a, again.draw(), strict=True))


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"length": 15}, "even number of tokens"),
        ({"length": 14}, "length 14: expected .* at least four a pair: 16"),
        ({"vocabulary": 8}, "vocabulary 8: expected .* at least 10 for 4 pairs"),
        ({"batch": 15}, "batch 15: expected a multiple of 2"),
        ({"pairs": (0, 4)}, "at least 1"),
    ],
)
def test_sizes_that_do_not_fit_together_are_refused(sizes, said):
    with pytest.raises(ValueError, match=said):
        replace(TASK, **sizes)


# --- the models and what they are compared with


def test_softmax_reads_no_later_token_and_rotary_scores_depend_on_distance():
    torch.manual_seed(0)
    layer = RecallModel(SOFT, SHAPE, 32).blocks[0].mixer
    x = torch.randn(1, 8, 32)
    changed = x.clone()
    changed[:, 5:] = 0
    torch.testing.assert_close(layer(x)[0][:, :5], layer(changed)[0][:, :5])
    q, k = (torch.randn(16).expand(8, 16) for _ in range(2))
    scores = rotate(q) @ rotate(k).T
    torch.testing.assert_close(scores[1:, 1:], scores[:-1, :-1])
    assert not torch.allclose(scores[1:, 0], scores[:-1, 0])


def test_the_balancing_loss_is_that_of_every_router():
    torch.manual_seed(0)
    model = RecallModel(MOM, SHAPE, TASK.vocabulary)
    batch = Sampler(TASK, CPU, 0).draw()
    logits = []
    for block in model.blocks:
        block.mixer.layer.router.register_forward_hook(lambda module, inputs, out: logits.append(out))
    _, balancing = model(batch)
    wanted = [training_loss(layer_logits, MOM) for layer_logits in logits]
    torch.testing.assert_close(balancing, torch.stack(wanted).mean())
    total, loss = model.losses(batch, 0.5)
    torch.testing.assert_close(total, loss + 0.5 * balancing)
    assert torch.autograd.grad(balancing, model.blocks[1].mixer.layer.router.weight)[0].abs().sum() > 0
    assert RecallModel(GDN, SHAPE, TASK.vocabulary)(batch)[1] is None


def training_loss(logits, mixer):
    """The balancing loss written out: M times the sum of share times mean probability."""
    probabilities = logits.softmax(-1)
    chosen = torch.zeros_like(logits).scatter_(1, logits.topk(mixer.topk).indices, 1.0)
    return mixer.memories * (chosen.mean(0) / mixer.topk * probabilities.mean(0)).sum()


@pytest.mark.parametrize("text", ["8/2", "4/1+shared", "gla:2/2", "4/2+shared+text"])
def test_baselines_match_state_parameters_and_time(text):
    mom = baselines.parse_mom(text, Mixer(heads=2))
    times = {heads: 1 + 0.1 * heads for heads in range(1, 65)}

    def milliseconds(mixer):
        return 1.5 if mixer == mom else times[mixer.heads]

    found = baselines.compare(mom, SHAPE, 1024, milliseconds).baselines
    assert set(found) == set(baselines.MATCHES.values())
    assert all(mixer.memories == 1 and not mixer.shared and not mixer.text_conv for mixer in found.values())
    assert found[baselines.STATE_PER_MEMORY].state * mom.all_memories == mom.state
    assert found[baselines.STATE_BY_HEADS].state == mom.state
    for name in (baselines.STATE_BY_KEYS, baselines.STATE_BY_VALUES):
        assert mom.state <= found[name].state < 2 * mom.state and found[name].heads == mom.heads
    target, by_parameters = count_parameters(mom, SHAPE, 1024), found[baselines.PARAMETERS]
    assert count_parameters(by_parameters, SHAPE, 1024) >= target
    assert count_parameters(replace(by_parameters, heads=by_parameters.heads - 1), SHAPE, 1024) < target
    assert found[baselines.TIME].heads == 5  # 1.5 ms
    assert baselines.TIME not in baselines.compare(mom, SHAPE, 1024).baselines
    wanted = (baselines.STATE_BY_KEYS, baselines.ATTENTION)
    assert set(baselines.compare(mom, SHAPE, 1024, milliseconds, wanted).baselines) == set(wanted)


def test_a_model_has_the_state_and_the_parameters_that_are_stated():
    for mixer in (GDN, MOM, replace(MOM, shared=True, heads=2), Mixer("gla", memories=2), TEXT_MOM):
        model = RecallModel(mixer, SHAPE, 32)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert count_parameters(mixer, SHAPE, 32) == trained
        _, state = model.blocks[0].mixer.layer(torch.randn(1, 4, 32), output_state=True)
        assert state.recurrent[0].numel() == mixer.state


def test_a_convolution_over_the_text_stands_in_the_place_of_the_memories_own():
    """Baselines and names are those of the model without it."""
    layer = RecallModel(TEXT_MOM, SHAPE, 32).blocks[0].mixer.layer
    assert layer.text_conv.shape == (32, 4) and layer.settings.conv_kernel == 1
    assert RecallModel(MOM, SHAPE, 32).blocks[0].mixer.layer.settings.conv_kernel == 4
    assert TEXT_MOM.name == MOM.name + " text conv" == "MoM(GDN) 4/2 1 x 16 x 16 text conv"
    alone = baselines.STATE_PER_MEMORY
    assert baselines.compare(TEXT_MOM, SHAPE, 32).baselines[alone] == baselines.compare(MOM, SHAPE, 32).baselines[alone]
    assert Mixer(heads=2, memories=4, topk=2, text_conv=4).alone == Mixer(heads=2)


def test_a_mom_model_is_written_in_words():
    base = Mixer(heads=2, key_size=32, value_size=32)
    assert baselines.parse_mom("4/2", base) == replace(base, memories=4, topk=2)
    assert baselines.parse_mom("gla:4/2+text", base) == replace(base, rule="gla", memories=4, topk=2, text_conv=4)
    wanted = replace(base, memories=8, topk=1, shared=True, text_conv=4, heads=16)
    for text in ("8/1+shared+text+16heads", "8/1+16heads+text+shared"):
        assert baselines.parse_mom(text, base) == wanted


def test_the_time_match_ends_at_the_most_heads():
    found = baselines.compare(MOM, SHAPE, 32, lambda mixer: 9.0 if mixer == MOM else 1.0).baselines
    assert found[baselines.TIME].heads == baselines.MOST_HEADS


def test_sets_name_mom_models_and_a_wrong_name_is_refused():
    assert baselines.names_of_set("decisive") == ["4/2"]
    moms = {baselines.parse_mom(name, GDN) for name in baselines.names_of_set("all")}
    wanted = {
        (rule, memories, topk, shared)
        for rule in ("gated_deltanet", "gla")
        for memories in (2, 4, 8)
        for topk in (1, 2)
        for shared in (False, True)
    }
    assert {(mom.rule, mom.memories, mom.topk, mom.shared) for mom in moms} == wanted
    wrong = ("8", "8/2+other", "8/9", "1/1", "nothing:4/2", ":8/2", "8/2+", "8/2+text+text", "8/2+0heads",
             "8/2+1heads+2heads")  # fmt: skip
    for text in wrong:
        with pytest.raises(ValueError, match="8|9|1/1|nothing"):
            baselines.parse_mom(text, GDN)


# --- training


def test_tiny_models_learn_and_rates_follow_the_schedule():
    settings = Settings(Task(vocabulary=16, length=8, pairs=(2,), batch=32), SHAPE, Training(steps=120, evaluations=8))
    results = train_group([Job(MOM, 1e-2, 0), Job(GDN, 1e-2, 0)], settings, CPU, say=quiet)
    for result in results:
        assert result.loss < 1.2  # the first guess among eight values costs ln 16 = 2.77
        assert result.accuracy[0] > 0.6 and result.curve[0][1] < 0.5
        assert [step for step, _ in result.curve] == list(range(15, 121, 15))
    schedule = [Training(steps=100).scale(step) for step in range(100)]
    assert schedule[0] == 0.2 and schedule[4:75] == [1.0] * 71 and schedule[99] == pytest.approx(0.04)


def test_a_step_is_adamw_with_clipping_on_the_loss():
    """The step against one that is written with backward() and an optimizer of its own."""
    batch = Sampler(TASK, CPU, 0).draw()
    model = TrainedModel(Job(MOM, 1e-2, 7), SETTINGS, batch, torch.ones(()))
    torch.manual_seed(7)
    other = RecallModel(MOM, SHAPE, TASK.vocabulary)
    groups = [
        {"params": [p for p in other.parameters() if p.dim() > 1], "weight_decay": 0.01},
        {"params": [p for p in other.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, foreach=False, fused=False)
    for _ in range(3):
        model.step()
        optimizer.zero_grad()
        other.losses(batch, 1e-2)[0].backward()
        torch.nn.utils.clip_grad_norm_(other.parameters(), 1.0)
        optimizer.step()
    for mine, wanted in zip(model.model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, wanted, atol=1e-5, rtol=1e-4)


def test_a_model_trains_alike_alone_and_in_a_group():
    jobs = [Job(GDN, 1e-2, 0), Job(SOFT, 3e-3, 1), Job(GDN, 1e-2, 1)]
    together = train_group(jobs, SETTINGS, CPU, say=quiet)
    alone = [train_group([job], SETTINGS, CPU, say=quiet)[0] for job in jobs]
    for a, b in zip(together, alone, strict=True):
        assert (a.job, a.accuracy, a.curve, a.loss) == (b.job, b.accuracy, b.curve, b.loss)


def test_a_group_gives_up_the_models_that_do_not_fit_the_time(monkeypatch):
    lines = []
    clock = iter(range(10**6))
    monkeypatch.setattr(training.time, "monotonic", lambda: next(clock))
    jobs = [Job(SOFT, rate, 0) for rate in (1e-3, 2e-3, 3e-3, 4e-3)]
    # Every look at the clock is a second: half of the steps took one, 0.6 s are left, and two of four models fit.
    settings = replace(SETTINGS, training=Training(steps=40, evaluations=1))
    results = train_group(jobs, settings, CPU, deadline=2.6, say=lines.append)
    assert [result.job for result in results] == jobs[:2]
    assert any("left for another run" in line for line in lines)
    for late, said in ((2.1, "need 1 s, and 0 s are left"), (-1.0, "not begun")):
        clock = iter(range(10**6))
        with pytest.raises(OutOfTime, match=said):
            train_group(jobs, settings, CPU, deadline=late, say=quiet)


def test_curves_are_flat_where_the_rate_is_constant_and_nothing_is_gained():
    setting = Training(steps=80, evaluations=16)
    steps = setting.evaluation_steps()
    rising = [(step, step / 80) for step in steps]
    stopped = [(step, min(step, 40) / 80) for step in steps]
    late = [(step, 0.5 if step <= 60 else 0.9) for step in steps]  # the rate falls from step 60 on
    assert not is_flat(rising, setting) and is_flat(stopped, setting) and is_flat(late, setting)


# --- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("mixer", [GDN, MOM, TEXT_MOM, Mixer("gla", memories=2), SOFT])
def test_a_captured_step_is_the_step(mixer):
    """The graph on a stream of its own changes weights as the step does that the host issues."""
    device = torch.device("cuda")
    batch = Sampler(TASK, device, 0).draw()
    captured, issued = (TrainedModel(Job(mixer, 1e-3, 0), SETTINGS, batch, torch.ones((), device=device)) for _ in "ab")
    start = torch.nn.utils.parameters_to_vector(issued.exact).detach().clone()
    captured.capture()
    assert torch.equal(torch.nn.utils.parameters_to_vector(captured.exact), start)
    captured.scale.fill_(1.0)
    for _ in range(3):
        captured.advance()
        issued.step()
    captured.join()
    assert captured.loss_sum.item() == pytest.approx(issued.loss_sum.item(), rel=1e-2)
    mine, wanted = (torch.nn.utils.parameters_to_vector(model.exact) for model in (captured, issued))
    assert (mine - wanted).abs().mean() < 0.1 * (wanted - start).abs().mean()


@pytest.mark.gpu
def test_models_learn_on_streams_of_their_own():
    settings = Settings(Task(vocabulary=16, length=8, pairs=(2,), batch=32), SHAPE, Training(steps=200, evaluations=10))
    results = train_group([Job(MOM, 1e-2, 0), Job(GDN, 1e-2, 0)], settings, torch.device("cuda"), say=quiet)
    assert all(result.loss < 1.2 and result.accuracy[0] > 0.6 for result in results)
