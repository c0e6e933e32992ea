"""Muon, AdamW and the learning rate."""

import pytest
import torch
from torch import nn

from models import MTLNet, UNet
from optimizers import MuonAdamW, is_hidden_convolution, make_optimizer, make_schedule
from utils import UncertaintyLoss, WeightedLoss


def make_weights(*shape):
    """A weight and its gradient for each of three steps; the gradients' singular values span a factor of 100."""
    torch.manual_seed(0)
    scale = torch.logspace(0, -2, shape[1])[:, None, None]
    return nn.Parameter(torch.randn(shape)), [torch.randn(shape) * scale for _ in range(3)]


def take_steps(optimizer, weight, gradients):
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach()


@pytest.mark.parametrize(
    'shape, fast', [((64, 32, 3, 3), True), ((96, 64, 1, 1), False)], ids=['wide', 'tall, float32']
)
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


def test_weights_without_muon_are_left_to_adamw_and_without_a_gradient_or_with_zeros_they_stay():
    (weight, gradients), (idle, _), (still, _) = (make_weights(32, 32, 1, 1) for _ in range(3))
    start = idle.detach().clone()
    still.grad = torch.zeros_like(still)
    groups = [{'params': [weight], 'muon': False}, {'params': [idle, still], 'muon': True, 'weight_decay': 0}]
    ours = take_steps(MuonAdamW(groups, lr=0.01), weight, gradients)
    assert torch.equal(idle, start) and torch.equal(still, start)
    weight, gradients = make_weights(32, 32, 1, 1)
    assert torch.equal(ours, take_steps(torch.optim.AdamW([weight], lr=0.01), weight, gradients))


def test_encoder_has_a_learning_rate_of_its_own_and_only_weights_decay():
    model, weighting = MTLNet(n_classes=3), UncertaintyLoss(MTLNet.tasks)
    found = [
        (id(parameter), group['lr'], group['weight_decay'] > 0)
        for group in make_optimizer(model, weighting, 0.003, 0.001, 0.05).param_groups
        for parameter in group['params']
    ]
    expected = [(id(p), 0.003, False) for p in weighting.parameters()]
    for name, p in model.named_parameters():
        expected.append((id(p), 0.001 if name.startswith('encoder.') else 0.003, p.ndim > 1))
    assert sorted(found) == sorted(expected)


def test_muon_takes_the_hidden_convolutions(full_networks):
    model = MTLNet()
    groups = make_optimizer(model, WeightedLoss.equal(model.tasks), 1, 1, 0.05).param_groups
    chosen = {id(p) for group in groups if group['muon'] for p in group['params']}
    last = 'decoder.logits.weight', 'class_head.logits.weight', 'box_head.sides.logits.weight'
    assert chosen == {id(p) for name, p in model.named_parameters() if p.ndim > 1 and name not in last}
    depthwise, pointwise = nn.Conv2d(64, 64, 3, groups=64), nn.Conv2d(64, 64, 1)
    assert not is_hidden_convolution(depthwise.weight) and is_hidden_convolution(pointwise.weight)


@pytest.mark.parametrize('steps', [1, 4, 7])
def test_any_number_of_steps_has_a_schedule(steps):
    model = UNet()
    optimizer = make_optimizer(model, WeightedLoss.equal(model.tasks), 0.003, 0.001, 0.05)
    schedule = make_schedule(optimizer, steps)
    for _ in range(steps):
        optimizer.step()
        schedule.step()
    first, *_, last = schedule.get_last_lr()
    assert 0 < last <= 0.001 and first == pytest.approx(3 * last)  # the encoder's comes last
