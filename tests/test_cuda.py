"""What needs a GPU, and the parts of benchmarks/cuda_check.py, on the CPU.

On a GPU: python benchmarks/cuda_check.py
"""

import json
import socket
from contextlib import nullcontext

import cuda_check
import numpy as np
import pytest
import torch
from conftest import train

import engine
from dataloader_mtl import MTLDataset, RandomCropFlip, Sample
from evaluation import evaluate, to_device
from models import MTLNet, load_model
from prediction import predict
from support.device import has_fast_bfloat16, seed_everything
from support.synthetic_pets import draw_pet
from utils import WeightedLoss

DEVICE = 'cuda'
GPU = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')]
ON_CUDA = pytest.mark.parametrize('device', [pytest.param(DEVICE, marks=GPU)])


# ---- training


@ON_CUDA
def test_augmentation_on_the_gpu_is_that_on_the_cpu(shared_data, device):
    """But for noise, which a GPU draws itself, and for bytes, which a CPU rounds after resizing."""
    options = {'zoom_out': 0.5, 'remove_pets': 0.3}
    dataset = MTLDataset('train', RandomCropFlip(80, 96), shared_data, **options)
    found = {}
    for name in device, 'cpu':
        seed_everything(0)
        dataset.device = torch.device(name)
        found[name] = dataset[list(range(16))]
    ours, cpu = (Sample(*(each.cpu() for each in found[name])) for name in (device, 'cpu'))
    assert found[device].image.is_cuda and (ours.image - cpu.image).abs().max() < 0.2
    assert (ours.image - cpu.image).abs().mean() < 0.01 and (ours.mask != cpu.mask).float().mean() < 0.001
    assert torch.equal(ours.label, cpu.label) and torch.equal(ours.bbox.nan_to_num(9), cpu.bbox.nan_to_num(9))


@ON_CUDA
def test_gradients_are_those_of_the_cpu(shared_data, device):
    found = {}
    for name in device, 'cpu':
        seed_everything(0)
        model = MTLNet(n_classes=8)
        model.class_head.dropout.p = 0
        model.to(name, memory_format=torch.channels_last)
        objective = engine.Objective(model, WeightedLoss.equal(MTLNet.tasks), bfloat16=False)
        batch = MTLDataset('train', root=shared_data)[list(range(8))]
        with cuda_check.exact():
            objective(to_device(batch, torch.device(name)))[0].backward()
        found[name] = torch.cat([p.grad.flatten().cpu() for p in model.parameters()])
    assert (found[device] - found['cpu']).norm() < 1e-3 * found['cpu'].norm()


@ON_CUDA
@pytest.mark.parametrize('encoder', ['unet', 'tf_efficientnet_lite0'])
def test_a_whole_run_and_its_model_on_the_cpu(shared_data, tmp_path, device, encoder):
    options = '--device', device, '--epochs', 1, '--encoder', encoder, '--encoder-weights', 'none'
    metrics = train(shared_data, tmp_path, *options)
    precision = 'bfloat16' if has_fast_bfloat16(torch.device(device)) else 'float32'
    assert (metrics['config']['device'], metrics['config']['precision']) == (device, precision)
    on_cpu = evaluate(load_model(tmp_path / 'best.pt'), MTLDataset('test', root=shared_data), torch.device('cpu'))
    assert on_cpu['dice'] == pytest.approx(metrics['test']['dice']['mean'], abs=0.03)


@ON_CUDA
def test_one_process_with_nccl_trains_as_one_without(shared_data, tmp_path, monkeypatch, device):
    options = '--device', device, '--epochs', 1
    plain = train(shared_data, tmp_path / 'plain', *options)['validation']
    with socket.create_server(('127.0.0.1', 0)) as server:
        port = server.getsockname()[1]
    for name, value in {'RANK': 0, 'WORLD_SIZE': 1, 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': port}.items():
        monkeypatch.setenv(name, str(value))
    parallel = train(shared_data, tmp_path / 'parallel', *options)['validation']
    for task in MTLNet.tasks:
        assert parallel[f'loss_{task}'] == pytest.approx(plain[f'loss_{task}'], rel=0.02)


@ON_CUDA
def test_predictions_are_those_of_the_cpu(device):
    images = [draw_pet(index).image for index in range(4)]
    with cuda_check.exact():
        there, here = (predict(load_model(device=name), images) for name in (device, 'cpu'))
    for one, other in zip(there, here):
        np.testing.assert_allclose(one.mask_probability, other.mask_probability, atol=1e-2)
        np.testing.assert_allclose(one.bbox, other.bbox, atol=1)
        assert one.breed == other.breed


# ---- the parts of cuda_check.py


def test_the_first_losses_are_compared_with_those_of_the_cpu(shared_data, monkeypatch):
    text, values = cuda_check.compare_losses(shared_data, 'cpu', steps=3)
    assert len(values['device']) == 3 and 'by ' in text
    losses = iter([[1.0, 1.0], [1.0, 1.002]])
    monkeypatch.setattr(cuda_check, 'first_losses', lambda config: next(losses))
    with pytest.raises(cuda_check.CheckFailed, match='differ .* by 2.0e-03 at most, more than 0.001'):
        cuda_check.compare_losses(shared_data, 'cpu')


def test_a_resumed_run_is_a_whole_one(shared_data, tmp_path, monkeypatch):
    stopped, train_it = [], engine.train
    monkeypatch.setattr(engine, 'train', lambda *args: stopped.append(args[2].resume) or train_it(*args))
    _, values = cuda_check.check_resume(shared_data, 'cpu', tmp_path, steps=2, batch_size=8)
    assert stopped == [None, None, None, 'last']
    assert values['resumed'] == values['repeated'] == 0


def test_a_resumed_run_that_differs_is_a_failure(monkeypatch, tmp_path):
    weights = iter([1.0, 1.0, 0.8])
    monkeypatch.setattr(cuda_check, 'train_to_end', lambda *_: {'x': torch.tensor([next(weights)])})
    with pytest.raises(cuda_check.CheckFailed, match='a resumed run differs by 2.5e-01'):
        cuda_check.check_resume('data', 'cpu', tmp_path)


def test_throughput_has_a_line_for_each_number_of_workers(shared_data):
    options = {'workers': (0, 1), 'steps': 4, 'warm_up': 1, 'seconds': 0.1}
    text, values = cuda_check.measure_throughput(shared_data, 'cpu', **options)
    assert list(values['images_per_second']) == ['no loading', 0, 1] and len(text.splitlines()) == 4
    assert all(speed > 0 for speed in values['images_per_second'].values())


@pytest.mark.parametrize('body, result', [('pass', 'passed'), ('assert 0', 'failed'), ('pytest.skip()', 'skipped')])
def test_failed_and_skipped_tests_are_failures(tmp_path, body, result):
    path = tmp_path / 'test_it.py'
    path.write_text(f'import pytest\n@pytest.mark.cuda\ndef test_it():\n    {body}\n')
    with nullcontext() if result == 'passed' else pytest.raises(cuda_check.CheckFailed, match=f'1 {result}'):
        assert '1 passed' in cuda_check.run_tests(path)[0]


def test_without_a_gpu_there_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    cuda_check.main([])
    assert capsys.readouterr().out == 'no CUDA device: nothing to check\n'


def test_a_failed_part_is_told_stops_no_other_and_makes_the_exit_status_1(monkeypatch, tmp_path, capsys):
    def too_large(*_):
        raise cuda_check.CheckFailed('too large')

    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda: 'A card')
    monkeypatch.setattr(cuda_check.common, 'prepared', lambda *_: nullcontext('drawn'))
    monkeypatch.setattr(cuda_check, 'run_tests', lambda: 1 / 0)
    monkeypatch.setattr(cuda_check, 'compare_losses', too_large)
    for name in 'check_resume', 'measure_throughput', 'measure_memory':
        monkeypatch.setattr(cuda_check, name, lambda data, device, *_, **__: (f'{data} on {device}', {'value': 3}))
    with pytest.raises(SystemExit) as stopped:
        cuda_check.main(['--out', str(tmp_path)])
    page = (tmp_path / 'cuda_check.txt').read_text()
    assert stopped.value.code == 1 and capsys.readouterr().out.startswith(page)
    assert page.startswith('A card, ') and page.count('drawn on cuda') == 4
    assert 'tests: FAILED' in page and 'ZeroDivisionError' in page and 'losses: FAILED, 0 s\ntoo large\n' in page
    results = json.loads((tmp_path / 'cuda_check.json').read_text())['parts']
    assert [name for name, part in results.items() if not part['ok']] == ['tests', 'losses']
    assert results['tests']['error'] == 'division by zero' and results['memory']['value'] == 3
