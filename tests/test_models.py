"""The networks and the files that hold them."""

import copy
import pickle

import pytest
import torch
from conftest import ROOT

import models
from models import (
    NETWORKS,
    AblatedNet,
    AblatedNet2,
    BoxHead,
    FlipAveraged,
    MTLNet,
    Outputs,
    UNet,
    load_model,
    model_content,
)
from support.checkpoint import MODEL_FORMAT, TRAINING_FORMAT, load_checkpoint, save_checkpoint
from support.cli import InputError


@pytest.mark.parametrize(
    'network, tasks',
    [
        (MTLNet, {'label', 'mask', 'bbox'}),
        (UNet, {'mask'}),
        (AblatedNet, {'label', 'mask'}),
        (AblatedNet2, {'mask', 'bbox'}),
    ],
)
def test_outputs_are_none_for_absent_tasks(network, tasks):
    outputs = network(c_in=3, c_out_seg=1)(torch.randn(2, 3, 64, 64))
    shapes = {'label': (2, 37), 'mask': (2, 1, 64, 64), 'bbox': (2, 4)}
    assert outputs._fields == ('label', 'mask', 'bbox')
    for name, value in outputs._asdict().items():
        assert (value is not None) == (name in tasks)
        assert value is None or value.shape == shapes[name]


@pytest.mark.parametrize('size', [(64, 64), (80, 80), (144, 208)])
def test_sides_that_are_multiples_of_16_from_64_up(size):
    outputs = MTLNet().eval()(torch.randn(1, 3, *size))
    assert outputs.mask.shape == (1, 1, *size)


@pytest.mark.parametrize('size', [(48, 64), (64, 72), (100, 100)])
def test_other_sides_are_refused(size):
    with pytest.raises(ValueError, match=f'{size[0]} x {size[1]}; sides must be multiples of 16'):
        MTLNet()(torch.randn(1, 3, *size))


def test_boxes_are_ordered_and_inside_for_any_weights():
    torch.manual_seed(0)
    model = MTLNet().eval()
    with torch.no_grad():
        for parameter in model.box_head.parameters():
            parameter.normal_(std=30)
        boxes = model(torch.randn(64, 3, 64, 64)).bbox
    assert (boxes >= 0).all() and (boxes <= 1).all() and (boxes[:, :2] <= boxes[:, 2:]).all()


def test_box_can_lie_in_any_corner(monkeypatch):
    head, features = BoxHead(models.CHANNELS), models.Encoder(3)(torch.zeros(1, 3, 256, 256))
    for (y1, x1), (y2, x2) in [((0, 0), (1, 1)), ((15, 15), (14, 14)), ((0, 15), (1, 14))]:
        maps = torch.full((1, 2, 16, 16), -50.0)
        maps[0, 0, y1, x1] = maps[0, 1, y2, x2] = 50
        monkeypatch.setattr(head.corners, 'forward', lambda x, maps=maps: maps)
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
        signs = torch.tensor([1.0, -1.0]).repeat(56)
        for pattern in (signs[:, None], signs[None, :], signs[:, None] * signs[None, :]):
            assert (logits * pattern).mean().abs() < 0.01 * logits.std()


def test_other_networks_have_a_subset_of_mtlnets_parameters():
    shapes = [{name: p.shape for name, p in network().named_parameters()} for network in NETWORKS.values()]
    assert len(shapes) == 7 and all(part.items() < shapes[0].items() for part in shapes[1:])


def test_every_parameter_has_a_gradient(full_networks):
    model = MTLNet()
    outputs = model(torch.randn(2, 3, 64, 64))
    sum(value.square().sum() for value in outputs).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_other_numbers_of_channels_and_classes():
    outputs = MTLNet(c_in=1, c_out_seg=2, n_classes=5)(torch.randn(2, 1, 64, 64))
    assert outputs.mask.shape == (2, 2, 64, 64) and outputs.label.shape == (2, 5)


# ---- averaged over flips


def unflip(outputs):
    """What the outputs for mirrored images say about the images."""
    mask, bbox = outputs.mask, outputs.bbox
    if bbox is not None:
        xmin, ymin, xmax, ymax = bbox.unbind(dim=1)
        bbox = torch.stack([1 - xmax, ymin, 1 - xmin, ymax], dim=1)
    return Outputs(outputs.label, mask if mask is None else mask.flip(-1), bbox)


@pytest.mark.parametrize('network', NETWORKS.values())
def test_outputs_averaged_over_flips_are_means_and_mirrored_with_the_images(network):
    torch.manual_seed(0)
    model, images = network(n_classes=4).eval(), torch.randn(3, 3, 64, 80)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)  # so that the outputs for an image and its mirror image differ
        found, mirrored = (FlipAveraged(model)(x) for x in (images, images.flip(-1)))
        one, two = model(images), unflip(model(images.flip(-1)))
    for value, same in zip(found, unflip(mirrored)):
        assert value is same is None or torch.allclose(value, same, atol=1e-6)
    for value, a, b, scale in zip(found, one, two, (lambda logits: logits.softmax(dim=1), torch.sigmoid, lambda x: x)):
        if value is None:
            assert a is b is None
        else:
            assert (a - b).abs().max() > 1e-3
            torch.testing.assert_close(scale(value), (scale(a) + scale(b)) / 2, atol=3e-6, rtol=1e-5)


# ---- model files

NAMES, CLASS_SPECIES = ['a cat', 'b dog'], ['cat', None]


@pytest.fixture
def model_path(tmp_path):
    save_checkpoint(tmp_path / 'model.pt', model_content(MTLNet(n_classes=2), NAMES, CLASS_SPECIES, (64, 80)))
    return tmp_path / 'model.pt'


@pytest.mark.parametrize('network', NETWORKS.values())
def test_model_file_rebuilds_its_model(tmp_path, network):
    save_checkpoint(tmp_path / 'model.pt', model_content(network(n_classes=2), NAMES, CLASS_SPECIES, (64, 80)))
    loaded = load_model(tmp_path / 'model.pt')
    assert type(loaded) is network and not loaded.training
    assert (loaded.class_names, loaded.class_species, loaded.image_size) == (NAMES, CLASS_SPECIES, (64, 80))


def test_model_file_holds_weights_in_half_precision_and_the_rest_as_it_is(tmp_path, full_networks):
    torch.manual_seed(0)
    model, path = MTLNet(n_classes=2), tmp_path / 'model.pt'
    model(torch.randn(2, 3, 64, 64))  # gives the BatchNorms statistics
    save_checkpoint(path, model_content(model, NAMES, CLASS_SPECIES, (64, 64)))
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert 0.5 < path.stat().st_size / size < 0.55
    parameters, loaded = dict(model.named_parameters()), load_model(path).state_dict()
    for name, tensor in model.state_dict().items():
        rounded = name in parameters and tensor.ndim > 1
        assert loaded[name].dtype == tensor.dtype != torch.float16
        assert torch.equal(loaded[name], tensor.half().float() if rounded else tensor), name


@pytest.mark.parametrize('name', ['mtl_model.pt', 'mtl_model_scratch.pt'])
def test_shipped_models_are_read_from_any_folder_and_can_be_copied(full_networks, monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    model = load_model() if name == 'mtl_model.pt' else load_model(ROOT / name)
    images = torch.rand(1, 3, *model.image_size)
    assert type(model) is MTLNet and {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    expected = model(images)
    for again in copy.deepcopy(model), pickle.loads(pickle.dumps(model)):
        assert all(each.isfinite().all() for each in expected)
        assert all(torch.equal(one, two) for one, two in zip(again(images), expected))
        assert again.class_names == model.class_names and again.state_dict().keys() == model.state_dict().keys()


def test_model_content_keeps_its_weights_while_the_model_trains():
    model = UNet()
    content = model_content(model, NAMES, CLASS_SPECIES, (64, 64))
    before = {name: value.clone() for name, value in content['weights'].items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert all(torch.equal(content['weights'][name], before[name]) for name in before)


WRONG_ENTRIES = {  # ...: missing
    'format': [torch.zeros(3), TRAINING_FORMAT],
    'network': ['Encoder', 'UNet', ['MTLNet'], ...],
    'class_names': ['ab', [1, 2], ['a'], [], ['\ud800', 'b'], ['a' * 10**6, 'b'], ...],
    'class_species': [None, ['cat'], ['cat', 'bird'], [['cat'], torch.zeros(3)], ...],
    'image_size': [[65, 64], [10**6, 10**6], [64.0, 64], ...],
    'weights': [None, {}, ...],
}


@pytest.mark.parametrize(
    'entry, value', [(entry, value) for entry, values in WRONG_ENTRIES.items() for value in values]
)
def test_wrong_or_missing_entry_of_a_model_file_is_refused(model_path, entry, value):
    content = load_checkpoint(model_path, MODEL_FORMAT) | {entry: value}
    torch.save({key: value for key, value in content.items() if value is not ...}, model_path)
    message = 'model.pt: (does not fit the networks|another kind of PyTorch file|a file of the format)'
    with pytest.raises(InputError, match=message) as error:
        load_model(model_path)
    assert '\n' not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize(
    'change',
    [
        lambda weight: weight * torch.nan,
        lambda weight: weight.fill_(torch.inf),
        lambda weight: weight[..., None],
        lambda weight: weight.tolist(),
    ],
    ids=['NaN', 'infinity', 'shape', 'list'],
)
@pytest.mark.parametrize('position', [0, -1])
def test_weights_that_do_not_fit_or_are_not_finite_are_refused(model_path, change, position):
    content = load_checkpoint(model_path, MODEL_FORMAT)
    name = [name for name, value in content['weights'].items() if value.is_floating_point()][position]
    content['weights'][name] = change(content['weights'][name])
    torch.save(content, model_path)
    with pytest.raises(InputError, match='model.pt: does not fit the networks'):
        load_model(model_path)
