# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""ScaledAdam, Muon and Eden against their formulas, worked out by hand; optimisers that go on from their state."""

import copy
import io
import math

import pytest
import torch
from torch.testing import assert_close

from scripts.decoders.optimizers import ScaledAdam, make_optimizer
from scripts.training.muon import Muon, orthogonal
from scripts.training.schedules import eden, phase, warmup_cosine

LR, B1, B2 = 0.05, 0.9, 0.95


def walk(start, gradient, steps, **options):
    """The values after each step of a tensor whose gradient never changes."""
    p = torch.nn.Parameter(torch.tensor(start, dtype=torch.float64))
    optimizer, seen = ScaledAdam([p], LR, (B1, B2), **options), []
    for _ in range(steps):
        p.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
        seen.append(p.detach().clone())
    return seen


def test_the_first_steps_are_a_share_of_the_tensors_size():
    """A constant gradient is its own root mean square: each step adds lr (1 - b1) rms against its sign."""
    start, gradient = [3.0, -4.0], [0.01, 20.0]
    rms, place, delta = math.sqrt(12.5), torch.tensor(start, dtype=torch.float64), 0.0
    for seen in walk(start, gradient, 3):
        delta = B1 * delta - LR * (1 - B1) * rms
        place = place + delta
        assert_close(seen, place, atol=1e-6, rtol=0)


def test_every_fourth_step_changes_the_size():
    start, gradient = [0.3, 0.5], [2.0, -1.0]
    first = walk(start, gradient, 4)
    before = [torch.tensor(start, dtype=torch.float64), *first[:3]]
    g = torch.tensor(gradient, dtype=torch.float64)
    along = torch.stack([(p * g).sum() for p in before])
    change = -0.1 * LR * along.sum() / along.square().mean().sqrt()  # b2^4 cancels in the first one
    rms = [math.sqrt((0.3**2 + 0.5**2) / 2)] * 3 + [float(before[3].square().mean().sqrt())]
    delta = torch.zeros(2, dtype=torch.float64)
    for step in range(4):
        delta = B1 * delta
        if step == 3:
            delta = delta + (1 - B1) * before[3] * change
        delta = delta - LR * (1 - B1) * rms[step] * g.sign()
        assert_close(first[step], before[step] + delta, atol=1e-9, rtol=0)


def test_sizes_beyond_the_limits():
    """Too large a tensor shrinks whatever its gradient; nearly nothing moves as if it had the least size, and is not
    shrunk further."""
    shrunk, g = walk([30.0, 30.0], [-1.0, -1.0], 4), -1.0
    delta = sum(B1**k for k in range(1, 4)) * LR * (1 - B1) * 30 - (1 - B1) * shrunk[2] * 0.4 * LR
    delta = delta - g * LR * (1 - B1) * shrunk[2]  # rms of two equal entries is the entry
    assert_close(shrunk[3] - shrunk[2], delta, atol=1e-7, rtol=0)
    nothing = walk([0.0, 0.0], [1.0, 1.0], 1)
    assert_close(nothing[0], torch.full((2,), -LR * (1 - B1) * 1e-5, dtype=torch.float64), atol=1e-12, rtol=0)
    steps = [LR * (1 - B1) * 1e-5 * sum(B1**k for k in range(n)) for n in range(1, 5)]
    tiny = walk([1e-6, 1e-6], [1.0, 1.0], 4)
    assert_close(tiny[-1], torch.full((2,), 1e-6 - sum(steps), dtype=torch.float64), atol=1e-13, rtol=0)


def test_a_lone_number_steps_at_a_tenth_and_stays_within_ten():
    assert_close(walk([2.0], [7.0], 1)[0], torch.tensor([2 - 0.1 * LR * (1 - B1)], dtype=torch.float64))
    assert float(walk([9.9999], [-1.0], 20)[-1]) == 10.0


def test_the_correction_of_a_young_mean_ends_below_one_percent():
    """Until then a constant gradient is its own root mean square; from then on it is up to half a percent more."""
    place, delta = 2.0, 0.0
    for n, seen in enumerate(walk([2.0], [7.0], 200), start=1):
        size = 1.0 if 1 - B2**n < 0.99 else (1 - B2**n) ** -0.5
        delta = B1 * delta - 0.1 * LR * (1 - B1) * size
        place += delta
        assert float(seen) == pytest.approx(place, abs=1e-7)


def test_gradients_are_held_to_twice_the_median_norm_after_a_thousand_steps():
    p = torch.nn.Parameter(torch.ones(4))
    optimizer = ScaledAdam([p], 0.0)
    for step in range(1001):
        p.grad = torch.full((4,), 1.0 if step < 1000 else 100.0)
        optimizer.step()
        if step == 999:
            squares = optimizer.state[p]["squares"].clone()
    assert float(optimizer.state[p]["norms"][1]) == 2.0  # norm of the gradient times a size of one
    assert float(optimizer.state[p]["threshold"]) == 4.0
    held = (optimizer.state[p]["squares"] - squares * 0.95) / 0.05
    assert_close(held, torch.full((4,), 4.0), rtol=1e-4, atol=0)  # norm 4: each entry 2


def moved_by_muon(start, gradients, lr=0.1):
    """How far each step takes a tensor, with these gradients one after the other."""
    p, steps = torch.nn.Parameter(start.clone()), []
    optimizer = Muon([p], lr)
    for gradient in gradients:
        p.grad, before = gradient, p.detach().clone()
        optimizer.step()
        steps.append(p.detach() - before)
    return steps


@pytest.mark.parametrize("shape", [(4, 3, 5), (20, 4), (20, 2, 2)])
def test_muon_goes_as_far_in_every_direction_of_a_gradient(shape):
    """Singular values of 1 to 0.05 become about one; a step's root mean square is a fifth of the learning rate."""
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(shape).flatten(1), full_matrices=False)
    gradient = u @ torch.diag(torch.tensor([1.0, 0.5, 0.2, 0.05])) @ v
    (step,) = moved_by_muon(torch.randn(shape), [7.0 * gradient.view(shape)])
    found = u.T @ step.flatten(1) @ v.T / (-0.1 * 0.2 * max(gradient.shape) ** 0.5)
    assert (found.diag() - 0.95).abs().max() < 0.3 and (found - found.diag().diag()).abs().max() < 0.06
    assert float(step.square().mean().sqrt()) == pytest.approx(0.2 * 0.1, rel=0.15)


def test_muon_remembers_and_looks_ahead():
    one, two = torch.zeros(2, 2, 3), torch.zeros(2, 2, 3)
    one[0, 0, 0], two[:, 1] = 1.0, torch.tensor([[1.0, 2.0, 3.0], [-1.0, 0.5, 0.0]])
    wanted = 0.95 * 0.95 * 0.05 * one + (0.05 + 0.95 * 0.05) * two
    wanted = orthogonal(wanted.flatten(1)).view(wanted.shape) * (-0.1 * 0.2 * 6**0.5)
    assert_close(moved_by_muon(torch.zeros(2, 2, 3), [one, two])[1], wanted, atol=3e-4, rtol=0)


@pytest.mark.parametrize("shape", [(5,), (5, 1, 1), (1, 5), ()])
def test_muon_moves_what_is_no_matrix_as_adam_does(shape):
    torch.manual_seed(0)
    gradients, p = [torch.randn(shape) for _ in range(4)], torch.nn.Parameter(torch.zeros(shape))
    adam = torch.optim.Adam([p], 0.1, (0.9, 0.99))
    for gradient, step in zip(gradients, moved_by_muon(torch.zeros(shape), gradients), strict=True):
        p.grad, before = gradient, p.detach().clone()
        adam.step()
        assert_close(step, p.detach() - before)


def test_muon_leaves_what_gets_no_gradient():
    """Also a weight whose gradient is nothing, as of a part that a batch does not use."""
    start = torch.randn(3, 4), torch.randn(3, 4), torch.randn(5)
    unused, *still = (torch.nn.Parameter(tensor.clone()) for tensor in start)
    for p in still:
        p.grad = torch.zeros_like(p)
    Muon([unused, *still], 0.1).step()
    assert all(torch.equal(p, tensor) for p, tensor in zip((unused, *still), start, strict=True))


@pytest.mark.parametrize(
    ("batch", "epoch", "rate"), [(20, 0, 0.05), (5_000, 0, 0.042), (50_000, 3, 0.0141), (300_000, 19, 0.0029)]
)
def test_eden(batch, epoch, rate):
    assert 0.05 * eden(batch, epoch) == pytest.approx(rate, abs=5e-5)


def test_eden_warms_up_from_half():
    assert [round(eden(n, 0), 4) for n in (0, 10, 20)] == [0.5, 0.75, 1.0]


def test_muon_leaves_tables_and_heads_to_adam(make_ar):
    model = make_ar()
    matrices, rest = make_optimizer("muon", model, 0.1, (0.9, 0.95), 0.1).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)].rpartition("layers.0.")[2] for p in matrices["params"]}
    wanted = {f"{place}.weight" for place in ("self_attn.in_proj", "self_attn.out_proj", "linear1", "linear2")}
    assert wanted < found and rest["momentum"] is None and matrices["weight_decay"] == rest["weight_decay"] == 0.1
    assert {"lm_head.weight", "model.audio_embedding.weight"} & {names[id(p)] for p in rest["params"]}
    assert len(matrices["params"]) + len(rest["params"]) == len(names)


def test_muon_without_its_momentum_is_adam_and_tensors_shrink():
    torch.manual_seed(0)
    start, gradient = torch.randn(4, 3), torch.randn(4, 3)
    p, q, b = (torch.nn.Parameter(start.clone()) for _ in range(3))
    b.data = b.data[0].clone()
    optimizer = Muon([{"params": [p, b], "momentum": None}, {"params": [q]}], 0.1, weight_decay=0.5)
    p.grad, q.grad, b.grad = gradient, gradient, gradient[0]
    optimizer.step()
    assert_close(p.detach(), start * 0.95 - 0.1 * gradient.sign(), atol=1e-5, rtol=0)
    assert_close(q.detach(), start * 0.95 - 0.1 * 0.2 * 2 * orthogonal(gradient), atol=2e-3, rtol=0)
    assert_close(b.detach(), start[0] - 0.1 * gradient[0].sign(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["adamw", "scaled_adam", "muon"])
def test_by_name_and_on_from_its_state(name):
    """It finds a minimum, and five steps are two and three more with the state between them."""
    torch.manual_seed(0)
    model, inputs, wanted = torch.nn.Linear(4, 3), torch.randn(32, 4), torch.randn(32, 3)

    def steps(model, optimizer, count):
        for _ in range(count):
            loss = (model(inputs) - wanted).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return float(loss.detach())

    def make(model):
        return make_optimizer(name, model, 0.01 if name == "muon" else 0.05, (0.9, 0.95), 0.0)

    other, third = copy.deepcopy(model), copy.deepcopy(model)
    steps(model, make(model), 5)
    optimizer = make(other)
    steps(other, optimizer, 2)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    optimizer = make(other)
    optimizer.load_state_dict(torch.load(file, weights_only=True))
    steps(other, optimizer, 3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))
    design = torch.cat([inputs, torch.ones(32, 1)], 1)
    least = float((design @ torch.linalg.lstsq(design, wanted).solution - wanted).square().mean())
    assert least < steps(third, make(third), 300) < 1.05 * least


@pytest.mark.parametrize("kind", [Muon, ScaledAdam])
def test_a_step_asks_its_closure(kind):
    p = torch.nn.Parameter(torch.tensor([2.0, 1.0]))
    optimizer = kind([p], 0.1)

    def closure():
        loss = p.square().sum()
        loss.backward()
        return loss

    assert float(optimizer.step(closure).detach()) == 5.0 and (p < torch.tensor([2.0, 1.0])).all()


def test_refusals():
    with pytest.raises(ValueError, match="'sgd' is not one of adamw, muon, scaled_adam"):
        make_optimizer("sgd", torch.nn.Linear(1, 1), 0.1, (0.9, 0.95), 0.0)
    with pytest.raises(ValueError, match="betas must be from 0 to below 1"):
        make_optimizer("scaled_adam", torch.nn.Linear(2, 2), 0.1, (0.9, 1.0), 0.0)
    with pytest.raises(ValueError, match="no weight decay"):
        make_optimizer("scaled_adam", torch.nn.Linear(1, 1), 0.1, (0.9, 0.95), 0.1)


def test_warm_up_and_cosine():
    """Linear to the whole rate, half of the way down in the middle, and at the last share from `steps` on."""
    shares = [warmup_cosine(step, 4, 104, 0.1) for step in (0, 1, 3, 4, 54, 104, 500)]
    assert shares == pytest.approx([0.25, 0.5, 1, 1, 0.55, 0.1, 0.1])
    assert warmup_cosine(0, 0, 10, 0.1) == 1 and warmup_cosine(5, 5, 5, 0.1) == 1  # no warm-up, and nothing else


def test_each_phase_has_its_own_warm_up_and_fall():
    """Frames alone, then all: both begin at the first step's rate and end at the last rate."""
    assert [phase(step, 4, 10) for step in (0, 3, 4, 9)] == [(0, 4), (0, 4), (4, 10), (4, 10)]
    assert phase(5, 0, 10) == (0, 10) and phase(1, 8, 3) == (0, 3)
