"""Muon, AdamW, the learning rate and the moving average."""

import pytest
import torch
from torch import nn

from models import MTLNet, UNet
from optimizers import MuonAdamW, is_hidden_convolution, make_average, make_optimizer, make_schedule, orthogonalise
from utils import UncertaintyLoss, WeightedLoss


def make_weights(*shape, steps=3):
    """A weight and its gradient for each of some steps; the gradients' singular values span a factor of 100."""
    torch.manual_seed(0)
    scale = torch.logspace(0, -2, shape[1])[:, None, None]
    return nn.Parameter(torch.randn(shape)), [torch.randn(shape) * scale for _ in range(steps)]


def take_steps(optimizer, weight, gradients):
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach()


@pytest.mark.parametrize('fast', [True, False], ids=['bfloat16', 'float32'])
@pytest.mark.parametrize('shape', [(64, 32, 3, 3), (96, 64, 1, 1)], ids=['wide', 'tall'])
def test_muon_steps_as_that_of_torch_does_on_matrices(shape, fast):
    weight, gradients = make_weights(*shape)
    start = weight.detach().clone()
    group = {'params': [weight], 'muon': True, 'weight_decay': 0.5}
    with torch.autocast('cpu', torch.bfloat16, enabled=fast):
        ours = take_steps(MuonAdamW([group], lr=0.01), weight, gradients)
    matrix = nn.Parameter(start.flatten(1).clone())
    options = {'weight_decay': 0.5, 'momentum': 0.95, 'ns_steps': 3, 'adjust_lr_fn': 'match_rms_adamw'}
    reference = torch.optim.Muon([matrix], lr=0.01, **options)
    theirs = take_steps(reference, matrix, [each.flatten(1) for each in gradients]).view(shape)
    assert (ours - theirs).norm() < 0.02 * (theirs - start).norm()


def test_orthogonalise_makes_singular_values_about_equal():
    _, (gradient,) = make_weights(64, 32, 3, 3, steps=1)
    before = torch.linalg.svdvals(gradient.flatten(1))
    after = torch.linalg.svdvals(orthogonalise(gradient.flatten(1)))
    assert before.max() > 3 * before.min() and 0.5 < after.min() and after.max() < 1.3
    assert not orthogonalise(torch.zeros(8, 8)).any()


def test_weights_without_muon_and_those_without_a_gradient_are_left_to_adamw():
    (weight, gradients), (other, _) = make_weights(32, 32, 1, 1), make_weights(32, 32, 1, 1)
    idle = other.detach().clone()
    groups = [{'params': [weight], 'muon': False}, {'params': [other], 'muon': True}]
    ours = take_steps(MuonAdamW(groups, lr=0.01), weight, gradients)
    weight, gradients = make_weights(32, 32, 1, 1)
    assert torch.equal(ours, take_steps(torch.optim.AdamW([weight], lr=0.01), weight, gradients))
    assert torch.equal(other, idle)


@pytest.mark.parametrize('network', [MTLNet, UNet])
def test_encoder_has_a_learning_rate_of_its_own_and_only_weights_decay(network):
    model, weighting = network(n_classes=3), UncertaintyLoss(network.tasks)
    found = {}
    for group in make_optimizer(model, weighting, 0.003, 0.001, 0.05).param_groups:
        for parameter in group['params']:
            assert id(parameter) not in found
            found[id(parameter)] = group['lr'], group['weight_decay'] > 0
    expected = {id(p): (0.003, False) for p in weighting.parameters()}
    for name, p in model.named_parameters():
        expected[id(p)] = 0.001 if name.startswith('encoder.') else 0.003, p.ndim > 1
    assert found == expected


@pytest.mark.parametrize('muon', [True, False])
def test_muon_takes_the_hidden_convolutions(full_networks, muon):
    model = MTLNet()
    groups = make_optimizer(model, WeightedLoss.equal(model.tasks), 1, 1, 0.05, muon).param_groups
    chosen = {id(p) for group in groups if group['muon'] for p in group['params']}
    last = 'decoder.logits.weight', 'class_head.logits.weight', 'box_head.corners.1.weight'
    hidden = {id(p) for name, p in model.named_parameters() if p.ndim > 1 and name not in last}
    assert chosen == (hidden if muon else set())
    depthwise, pointwise = nn.Conv2d(64, 64, 3, groups=64), nn.Conv2d(64, 64, 1)
    assert not is_hidden_convolution(depthwise.weight) and is_hidden_convolution(pointwise.weight)


@pytest.mark.parametrize('steps', range(1, 8))
def test_any_number_of_steps_has_a_schedule(steps):
    model = UNet()
    optimizer = make_optimizer(model, WeightedLoss.equal(model.tasks), 0.003, 0.001, 0.05)
    schedule = make_schedule(optimizer, steps)
    for _ in range(steps):
        optimizer.step()
        schedule.step()
    first, *_, last = schedule.get_last_lr()
    assert 0 < last <= 0.001 and first == pytest.approx(3 * last)  # the encoder's comes last


def test_moving_average_soon_forgets_the_start_and_then_is_slow():
    average, values = make_average(UNet(), 2000, share=0.05).multi_avg_fn, [torch.zeros(1)]
    for count in range(1, 1001):
        average(values, [torch.ones(1)], torch.tensor(count))
        if count == 20:
            assert values[0] > 0.95
    before = values[0].item()
    average(values, [torch.zeros(1)], torch.tensor(1000))
    assert values[0].item() == pytest.approx(0.99 * before)
