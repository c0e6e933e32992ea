"""The networks and the files that hold them."""

import copy
import pickle

import pytest
import torch

import models
from models import AblatedNet, AblatedNet2, BoxHead, FlipAveraged, MTLNet, Outputs, UNet, load_model
from support.checkpoint import MODEL_FORMAT, load_checkpoint, save_checkpoint
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
def test_outputs_have_the_shapes_that_were_asked_for_and_are_none_for_absent_tasks(network, tasks):
    outputs = network(c_in=1, c_out_seg=2, n_classes=5)(torch.randn(3, 1, 80, 144))
    shapes = {'label': (3, 5), 'mask': (3, 2, 80, 144), 'bbox': (3, 4)}
    found = {name: tuple(value.shape) for name, value in outputs._asdict().items() if value is not None}
    assert found == {name: shapes[name] for name in tasks}


@pytest.mark.parametrize('size', [(48, 64), (64, 72)])
def test_sides_that_are_no_multiples_of_16_from_64_up_are_refused(size):
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


def test_sides_of_a_box_can_lie_on_the_border_and_come_in_any_order(monkeypatch):
    head, features = BoxHead(models.CHANNELS), models.Encoder(3)(torch.zeros(1, 3, 256, 256))
    for columns, rows in [((0, 31), (0, 31)), ((31, 30), (31, 30)), ((0, 31), (30, 0))]:
        maps = torch.full((1, 4, 32, 32), -50.0)
        for number in range(2):
            maps[0, number, 5, columns[number]] = maps[0, 2 + number, rows[number], 5] = 50
        monkeypatch.setattr(head.sides, 'forward', lambda features, maps=maps: maps)
        expected = [min(columns) / 31, min(rows) / 31, max(columns) / 31, max(rows) / 31]
        assert head(features)[0].tolist() == pytest.approx(expected, abs=1e-5)


def test_dropout_is_off_in_evaluation_and_on_in_training():
    torch.manual_seed(0)
    model, images = MTLNet(), torch.randn(2, 3, 64, 64)
    assert not torch.equal(model(images).label, model(images).label)
    model.eval()
    assert all(torch.equal(a, b) for a, b in zip(model(images), model(images)))


def test_masks_have_no_checkerboard(full_networks):
    signs = torch.tensor([1.0, -1.0]).repeat(56)
    for seed in range(3):
        torch.manual_seed(seed)
        logits = UNet().eval()(torch.randn(1, 3, 128, 128)).mask[0, 0, 8:-8, 8:-8]
        for pattern in (signs[:, None], signs[None, :], signs[:, None] * signs[None, :]):
            assert (logits * pattern).mean().abs() < 0.01 * logits.std()


def test_every_parameter_has_a_gradient(full_networks):
    model = MTLNet()
    outputs = model(torch.randn(2, 3, 64, 64))
    sum(value.square().sum() for value in outputs).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_outputs_averaged_over_flips_are_means_of_an_image_and_its_mirror_image():
    torch.manual_seed(0)
    model, images = MTLNet(n_classes=4).eval(), torch.randn(3, 3, 64, 80)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)  # so that the outputs for an image and its mirror image differ
        found, plain, mirrored = FlipAveraged(model)(images), model(images), model(images.flip(-1))
    xmin, ymin, xmax, ymax = mirrored.bbox.T
    turned_back = Outputs(mirrored.label, mirrored.mask.flip(-1), torch.stack([1 - xmax, ymin, 1 - xmin, ymax], dim=1))
    scales = {'label': lambda logits: logits.softmax(dim=1), 'mask': torch.sigmoid, 'bbox': lambda box: box}
    for name, scale in scales.items():
        value, one, two = (scale(getattr(outputs, name)) for outputs in (found, plain, turned_back))
        assert (one - two).abs().max() > 1e-3
        torch.testing.assert_close(value, (one + two) / 2, atol=3e-6, rtol=1e-5)


# ---- model files


def model_content(model):
    return models.model_content(model, ['a cat', 'b dog'], ['cat', None], (64, 80))


@pytest.fixture
def model_path(tmp_path):
    save_checkpoint(tmp_path / 'model.pt', model_content(MTLNet(n_classes=2)))
    return tmp_path / 'model.pt'


def test_model_file_holds_weights_in_half_precision_and_the_rest_as_it_is(tmp_path, full_networks):
    torch.manual_seed(0)
    model, path = MTLNet(n_classes=2), tmp_path / 'model.pt'
    model(torch.randn(2, 3, 64, 64))  # gives the BatchNorms statistics
    save_checkpoint(path, model_content(model))
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert 0.5 < path.stat().st_size / size < 0.55
    loaded, parameters = load_model(path), dict(model.named_parameters())
    assert type(loaded) is MTLNet and not loaded.training
    about = loaded.class_names, loaded.class_species, loaded.image_size
    assert about == (['a cat', 'b dog'], ['cat', None], (64, 80))
    for name, tensor in model.state_dict().items():
        rounded = name in parameters and tensor.ndim > 1
        found = loaded.state_dict()[name]
        assert found.dtype == tensor.dtype and torch.equal(found, tensor.half().float() if rounded else tensor), name


def test_loaded_model_can_be_copied_and_pickled(model_path):
    model, images = load_model(model_path), torch.rand(1, 3, 64, 80)
    for again in copy.deepcopy(model), pickle.loads(pickle.dumps(model)):
        assert all(torch.equal(one, two) for one, two in zip(again(images), model(images)))
        assert again.class_names == model.class_names


def test_model_content_keeps_its_weights_while_the_model_trains():
    model = UNet()
    weights = model_content(model)['weights']
    before = copy.deepcopy(weights)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert all(torch.equal(weights[name], before[name]) for name in before)


WRONG_ENTRIES = {  # ...: missing
    'format': [torch.zeros(3)],
    'network': ['Encoder', 'UNet', ['MTLNet'], ...],
    'encoder': ['lcnet_050', ['unet'], None],
    'class_names': ['ab', [1, 2], ['a'], [], ['\ud800', 'b'], ['a' * 10**6, 'b']],
    'class_species': [None, ['cat'], ['cat', 'bird'], [['cat'], torch.zeros(3)]],
    'image_size': [[65, 64], [10**6, 10**6], [64.0, 64]],
    'weights': [None, {}],
}


@pytest.mark.parametrize(
    'entry, value', [(entry, value) for entry, values in WRONG_ENTRIES.items() for value in values]
)
def test_wrong_or_missing_entry_of_a_model_file_is_refused(model_path, entry, value):
    content = load_checkpoint(model_path, MODEL_FORMAT) | {entry: value}
    torch.save({key: value for key, value in content.items() if value is not ...}, model_path)
    message = 'model.pt: (does not fit the networks|encoder |another kind of PyTorch file|a file of the format)'
    with pytest.raises(InputError, match=message) as error:
        load_model(model_path)
    assert '\n' not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize(
    'change',
    [lambda weight: weight.fill_(torch.nan), lambda weight: weight[..., None], lambda weight: weight.tolist()],
    ids=['NaN', 'shape', 'list'],
)
def test_weight_that_does_not_fit_or_is_not_finite_is_refused(model_path, change):
    content = load_checkpoint(model_path, MODEL_FORMAT)
    content['weights']['class_head.logits.weight'] = change(content['weights']['class_head.logits.weight'])
    torch.save(content, model_path)
    with pytest.raises(InputError, match='model.pt: does not fit the networks'):
        load_model(model_path)
