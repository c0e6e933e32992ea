"""The networks: shapes, what is true by construction, and one set of parts."""

import pytest
import torch

import models
from models import AblatedNet, AblatedNet2, BoxHead, MTLNet, UNet


@pytest.mark.parametrize('network, tasks', [
    (MTLNet, {'label', 'mask', 'bbox'}), (UNet, {'mask'}), (AblatedNet, {'label', 'mask'}),
    (AblatedNet2, {'mask', 'bbox'}),
])
def test_outputs_are_none_for_absent_tasks(network, tasks):
    outputs = network(c_in=3, c_out_seg=1)(torch.randn(2, 3, 64, 64))
    shapes = {'label': (2, 37), 'mask': (2, 1, 64, 64), 'bbox': (2, 4)}
    assert outputs._fields == ('label', 'mask', 'bbox')
    for name, value in outputs._asdict().items():
        assert (value is not None) == (name in tasks)
        assert value is None or value.shape == shapes[name]


@pytest.mark.parametrize('size', [(64, 64), (80, 80), (96, 64), (144, 208), (256, 256)])
def test_any_multiple_of_16_from_64_up_runs(size):
    outputs = MTLNet().eval()(torch.randn(1, 3, *size))
    assert outputs.mask.shape == (1, 1, *size)


@pytest.mark.parametrize('size', [(48, 64), (64, 72), (100, 100)])
def test_other_sizes_are_refused_with_the_size(size):
    with pytest.raises(ValueError, match=f'{size[0]} x {size[1]}; sides must be multiples of 16'):
        MTLNet()(torch.randn(1, 3, *size))


def test_boxes_are_ordered_and_inside_whatever_the_weights():
    torch.manual_seed(0)
    model = MTLNet().eval()
    with torch.no_grad():
        for parameter in model.box_head.parameters():
            parameter.normal_(std=30)
        boxes = model(torch.randn(64, 3, 64, 64)).bbox
    assert (boxes >= 0).all() and (boxes <= 1).all() and (boxes[:, :2] <= boxes[:, 2:]).all()


class Maps(torch.nn.Module):
    """Stands for a box head's convolutions: returns the maps that it is given."""

    def __init__(self, maps):
        super().__init__()
        self.maps = maps

    def forward(self, x):
        return self.maps


def test_a_box_can_lie_in_any_corner():
    features = [torch.zeros(1, channels, 256 // 2**level, 256 // 2**level)
                for level, channels in enumerate(models.CHANNELS, start=1)]
    head = BoxHead()
    for (y1, x1), (y2, x2) in [((0, 0), (1, 1)), ((15, 15), (14, 14)), ((0, 15), (1, 14))]:
        maps = torch.full((1, 2, 16, 16), -50.)
        maps[0, 0, y1, x1] = maps[0, 1, y2, x2] = 50
        head.corners = Maps(maps)
        expected = [min(x1, x2) / 15, min(y1, y2) / 15, max(x1, x2) / 15, max(y1, y2) / 15]
        assert head(features)[0].tolist() == pytest.approx(expected, abs=1e-5)


def test_dropout_is_off_in_evaluation_and_on_in_training():
    torch.manual_seed(0)
    model, images = MTLNet(), torch.randn(2, 3, 64, 64)
    assert not torch.equal(model(images).label, model(images).label)
    model.eval()
    assert all(torch.equal(a, b) for a, b in zip(model(images), model(images)))


def test_masks_have_no_checkerboard(full_networks):
    torch.manual_seed(0)
    for seed in range(3):
        torch.manual_seed(seed)
        logits = UNet().eval()(torch.randn(1, 3, 128, 128)).mask[0, 0, 8:-8, 8:-8]
        signs = torch.tensor([1., -1.]).repeat(56)
        for pattern in (signs[:, None], signs[None, :], signs[:, None] * signs[None, :]):
            assert (logits * pattern).mean().abs() < 0.01 * logits.std()


def test_decoding_some_images_gives_the_logits_of_decoding_all():
    model, images = MTLNet().eval(), torch.randn(4, 3, 64, 64)
    chosen = torch.tensor([True, False, False, True])
    some, every = model(images, decode=chosen), model(images)
    torch.testing.assert_close(some.mask, every.mask[chosen])
    torch.testing.assert_close(some.label, every.label)
    assert model(images, decode=torch.zeros(4, dtype=torch.bool)).mask is None


def test_decoding_some_images_keeps_gradients_channels_last():
    """Where two layouts meet, every operation is many times slower."""
    x = torch.randn(4, 3, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
    chosen = models.select_rows(x, torch.tensor([True, False, True, False]))
    assert chosen.is_contiguous(memory_format=torch.channels_last)
    layouts = []
    product = x * 1
    product.register_hook(lambda grad: layouts.append(grad.is_contiguous(memory_format=torch.channels_last)))
    models.select_rows(product, torch.tensor([True, False, True, False])).sum().backward()
    assert layouts == [True]


def test_the_four_networks_share_their_parts():
    whole = dict(MTLNet().named_parameters())
    for network in UNet, AblatedNet, AblatedNet2:
        part = dict(network().named_parameters())
        assert part.keys() < whole.keys()
        assert all(part[name].shape == whole[name].shape for name in part)
    blocks = [name for name, value in vars(models).items()
              if isinstance(value, type) and issubclass(value, models.SharedEncoderNet)]
    assert len(blocks) == 5


def test_every_parameter_learns_from_the_three_tasks(full_networks):
    model = MTLNet()
    outputs = model(torch.randn(2, 3, 64, 64))
    sum(value.square().sum() for value in outputs).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_other_channels_and_classes_are_taken():
    outputs = MTLNet(c_in=1, c_out_seg=2, n_classes=5)(torch.randn(2, 1, 64, 64))
    assert outputs.mask.shape == (2, 2, 64, 64) and outputs.label.shape == (2, 5)
