"""Training, evaluation and checkpoints."""

import csv
import itertools
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import pytest
import torch
from PIL import Image
from torch.utils.data import Subset

import data_rechunk
import engine
import train_mtl
from data_rechunk import InputError, Interrupted
from dataloader_mtl import MTLDataset
from models import MTLNet, Outputs, UNet
from utils import UncertaintyLoss, WeightedLoss


def arguments_of(data, out, *more):
    return ['--data', str(data), '--out', str(out), '--epochs', '2', '--workers', '0', *more]


def arguments(data, out, *more):
    return engine.training_parser('', out='').parse_args(arguments_of(data, out, *more))


def train(data, out, *more, network=MTLNet, weighting=None):
    weighting = weighting or WeightedLoss.equal(network.tasks)
    return engine.train(network, weighting, arguments(data, out, *more))


class Oracle(torch.nn.Module):
    """Predicts what it is told for each image, whichever batch the image comes in."""

    def __init__(self, dataset, predict):
        super().__init__()
        self.samples = [dataset[i] for i in range(len(dataset))]
        self.predict = predict

    def forward(self, images, decode=None):
        found = [next(s for s in self.samples if torch.equal(s[0], image)) for image in images]
        rows = [self.predict(index, *sample) for index, sample in enumerate(found)]
        label, mask, bbox = (torch.stack(parts) for parts in zip(*rows))
        return Outputs(label, mask[decode] if decode.any() else None, bbox)


def perfect(index, image, bbox, label, mask):
    return torch.eye(8)[label], (mask - 0.5) * 20, bbox


def imperfect(index, image, bbox, label, mask):
    """A guess from the image alone."""
    box = torch.tensor([.2, .1, .7, .6]) + image.mean() / 20
    return torch.eye(8)[int(image.std() * 100) % 8], image.mean(dim=0, keepdim=True), box


@pytest.mark.parametrize('batch_size', [1, 5, 7, 32])
def test_a_perfect_prediction_scores_exactly_one(shared_data, batch_size):
    dataset = MTLDataset('test', root=shared_data)
    figures = engine.evaluate(Oracle(dataset, perfect), dataset, torch.device('cpu'), batch_size)
    assert {name: figures[name] for name in engine.METRICS} == dict.fromkeys(engine.METRICS, 1)


def test_figures_do_not_depend_on_the_batch_size(data):
    """Also with labels missing, so that batches hold different numbers of them."""
    dataset = MTLDataset('train', root=data)
    dataset.bboxes[::3] = math.nan
    dataset.labelled['box'][::3] = False
    dataset.labels[1::4] = -1
    found = [engine.evaluate(Oracle(dataset, imperfect), dataset, torch.device('cpu'), size)
             for size in (1, 7, 32)]
    assert 0 < found[0]['dice'] < 1 and 0 < found[0]['box_iou'] < 1
    for other in found[1:]:
        assert {k: other[k] for k in engine.METRICS} == {k: found[0][k] for k in engine.METRICS}
        assert other == pytest.approx(found[0], rel=1e-6)


def test_evaluation_leaves_the_mode_as_it_was_and_uses_evaluation_mode(shared_data):
    dataset = Subset(MTLDataset('test', root=shared_data), range(6))
    model = MTLNet(n_classes=8).train()
    first = engine.evaluate(model, dataset, torch.device('cpu'))
    assert model.training
    assert first == engine.evaluate(model, dataset, torch.device('cpu'))


def test_a_run_writes_what_the_readme_promises(shared_data, tmp_path, capsys):
    metrics = train(shared_data, tmp_path / 'run')
    files = sorted(path.name for path in (tmp_path / 'run').iterdir())
    assert files == ['best.pt', 'curves.png', 'last.pt', 'log.csv', 'metrics.json', 'previous.pt']
    with open(tmp_path / 'run' / 'log.csv') as file:
        rows = list(csv.DictReader(file))
    assert [row['epoch'] for row in rows] == ['1', '2'] and float(rows[1]['val_dice']) > 0
    assert json.loads((tmp_path / 'run' / 'metrics.json').read_text()) == metrics
    assert metrics['data']['test'] == {'photographs': 12, 'class': 12, 'mask': 12, 'box': 12}
    assert metrics['config']['seed'] == 0 and 'torch' in metrics['versions']
    assert Image.open(tmp_path / 'run' / 'curves.png').size[0] > 600
    printed = capsys.readouterr().out
    for line in ('Dice Score - Segmentation: ', 'Accuracy - Classification: ',
                 'IoU - Bounding Box Regression: ', 'IoU - Segmentation: '):
        assert line in printed


def test_the_epoch_with_the_best_validation_dice_is_tested_once(shared_data, tmp_path, monkeypatch):
    scores, asked, weights, original = iter([0.3, 0.9, 0.5, 0.7]), [], [], engine.evaluate

    def evaluate(model, dataset, *args, **kw):
        asked.append(dataset.dataset.folder.name)
        weights.append(next(model.parameters()).detach().clone())
        figures = original(model, dataset, *args, **kw)
        return figures | {'dice': next(scores)} if asked[-1] == 'val' else figures

    monkeypatch.setattr(engine, 'evaluate', evaluate)
    metrics = train(shared_data, tmp_path, '--epochs', '4', '--limit-batches', '1')
    assert asked == ['val'] * 4 + ['test']
    assert metrics['best_epoch'] == 2 and metrics['validation']['dice'] == 0.9
    assert torch.equal(weights[4], weights[1]) and not torch.equal(weights[4], weights[3])


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(shared_data, tmp_path):
    weights = []
    for number, (seed, workers) in enumerate([(1, 1), (1, 1), (2, 1)]):
        out = tmp_path / str(number)
        train(shared_data, out, '--seed', str(seed), '--workers', str(workers), '--limit-batches', '2')
        weights.append(torch.load(out / 'best.pt', weights_only=True)['weights'])
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not all(torch.equal(weights[0][name], weights[2][name]) for name in weights[0])


def stop_at_step(monkeypatch, number, step):
    """Let the process send itself the signal `number` in the middle of its training step `step`."""
    original, count = torch.optim.AdamW.step, itertools.count(1)

    def optimizer_step(*args, **kw):
        original(*args, **kw)
        if next(count) == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(torch.optim.AdamW, 'step', optimizer_step)


def same(one, two):
    """Whether two nested values are equal in every bit, but for seconds."""
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(
            same(one[key], two[key]) for key in one if 'second' not in str(key))
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(same, one, two))
    return torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two


def contents(out):
    return [torch.load(out / name, weights_only=True) for name in ('last.pt', 'best.pt')]


@pytest.mark.parametrize('step', [1, 4, 5, 6])
def test_a_run_stopped_in_an_epoch_and_resumed_ends_with_the_same_bits(shared_data, tmp_path, monkeypatch, step):
    """Three steps an epoch; both losses' weights and dropout are part of it, and two loading processes."""
    def run(out, *more):
        train(shared_data, tmp_path / out, '--epochs', '3', '--workers', '2', *more,
              weighting=UncertaintyLoss(MTLNet.tasks))

    run('whole')
    with monkeypatch.context() as patch:
        stop_at_step(patch, signal.SIGTERM, step)
        with pytest.raises(Interrupted, match='go on with the same command and --resume') as stopped:
            run('parts')
    assert stopped.value.status == 143
    stopped_at = torch.load(tmp_path / 'parts' / 'last.pt', weights_only=True)
    assert len(stopped_at['history']) * 3 + stopped_at['steps'] == step
    run('parts', '--resume')
    assert same(contents(tmp_path / 'whole'), contents(tmp_path / 'parts'))


def test_the_number_of_loading_processes_changes_no_bit(shared_data, tmp_path):
    for workers in '1', '2':
        train(shared_data, tmp_path / workers, '--workers', workers)
    assert same(contents(tmp_path / '1'), contents(tmp_path / '2'))


def test_a_signal_in_the_evaluation_ends_it_after_the_batch_and_loses_no_step(shared_data, tmp_path, monkeypatch):
    train(shared_data, tmp_path / 'whole')
    evaluated, forward, batches_of = [], engine.forward, engine.batches_of

    def evaluated_forward(model, batch):
        if not model.training:
            evaluated.append(len(batch[0]))
            os.kill(os.getpid(), signal.SIGINT)
        return forward(model, batch)

    with monkeypatch.context() as patch:
        patch.setattr(engine, 'forward', evaluated_forward)
        patch.setattr(engine, 'batches_of', lambda order, size: batches_of(order, 4 if len(order) == 12 else size))
        with pytest.raises(Interrupted, match='in epoch 1, after 3 steps') as stopped:
            train(shared_data, tmp_path / 'parts')
    assert stopped.value.status == 130 and evaluated == [4]
    train(shared_data, tmp_path / 'parts', '--resume')
    assert same(contents(tmp_path / 'whole'), contents(tmp_path / 'parts'))


def test_a_checkpoint_is_written_within_the_epoch_when_it_is_time(shared_data, tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(engine, 'save_state', lambda state, folder: written.append(len(state['history']) * 3 + state['steps']))
    train(shared_data, tmp_path / 'often', '--checkpoint-minutes', '1e-9')
    assert written == [1, 2, 3, 4, 5, 6]
    written.clear()
    train(shared_data, tmp_path / 'seldom')
    assert written == [3, 6]


def test_resuming_with_other_options_is_refused_with_the_differences(shared_data, tmp_path):
    train(shared_data, tmp_path, '--limit-batches', '1')
    with pytest.raises(InputError, match='lr was 0.003 and is 0.1'):
        train(shared_data, tmp_path, '--limit-batches', '1', '--lr', '0.1', '--resume')
    with pytest.raises(InputError, match='no such file'):
        train(shared_data, tmp_path / 'new', '--resume')


def test_the_moving_average_soon_forgets_the_start_and_then_is_slow():
    average, values = engine.moving_average(0.99), [torch.zeros(1)]
    for count in range(1, 1001):
        average(values, [torch.ones(1)], torch.tensor(count))
        if count == 20:
            assert values[0] > 0.95
    before = values[0].item()
    average(values, [torch.zeros(1)], torch.tensor(1000))
    assert values[0].item() == pytest.approx(0.99 * before)


def test_uncertainty_weights_are_optimised(shared_data, tmp_path):
    metrics = train(shared_data, tmp_path, weighting=UncertaintyLoss(MTLNet.tasks))
    assert set(metrics['learned_weighting']) == {f'log_variance.{task}' for task in MTLNet.tasks}
    assert all(abs(value) > 1e-4 for value in metrics['learned_weighting'].values())


def test_the_weights_reach_the_loss(shared_data, tmp_path):
    """With no weight on the box, its head keeps the weights it started with, but for decay."""
    weighting = WeightedLoss({'mask': 1, 'class': 1, 'box': 0})
    train(shared_data, tmp_path, '--limit-batches', '1', weighting=weighting)
    moments = torch.load(tmp_path / 'last.pt', weights_only=True)
    names = [name for name, p in MTLNet(n_classes=8).named_parameters() if p.ndim > 1]
    for index, name in enumerate(names):
        moved = bool(moments['optimizer']['state'][index]['exp_avg'].abs().sum() > 0)
        assert moved == (not name.startswith('box_head')), name


@pytest.mark.parametrize('size', [1, 2, 3])
@pytest.mark.parametrize('count, batch_size', [(36, 16), (37, 5), (16, 16), (7, 4)])
def test_processes_share_each_batch_and_give_each_sample_once(monkeypatch, size, count, batch_size):
    order, shares = torch.randperm(count), []
    for rank in range(size):
        monkeypatch.setattr(engine, 'rank_and_size', lambda: (rank, size))
        shares.append(engine.batches_of(order, batch_size))
    assert sorted(i for share in shares for batch in share for i in batch) == list(range(count))
    assert len({len(share) for share in shares}) == 1
    totals = [sum(map(len, batches)) for batches in zip(*shares)]
    assert max(totals) <= batch_size and max(totals) - min(totals) <= 1


def test_two_processes_train_one_model_and_get_the_figures_of_one(shared_data, tmp_path):
    """Through torchrun, twice in a run, with fixed and with learned weights: both processes must agree."""
    script, out = tmp_path / 'two_weightings.py', tmp_path / 'run'
    script.write_text("import oeq_weighting\noeq_weighting.NAMES = 'equal', 'uncertainty'\noeq_weighting.main()\n")
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2',
               str(script), *arguments_of(shared_data, out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('epoch 2/2') == done.stdout.count('Dice Score - Segmentation') == 2
    dataset = Subset(MTLDataset('test', root=shared_data), range(12))
    for name in 'equal', 'uncertainty':
        metrics = json.loads((out / name / 'metrics.json').read_text())
        assert metrics['config']['processes'] == 2
        alone = engine.evaluate(engine.load_model(out / name / 'best.pt'), dataset, torch.device('cpu'))
        assert metrics['test'] == pytest.approx(alone, rel=1e-5)


SHARES = """
import sys, torch, torch.distributed as dist, engine
from models import MTLNet
from utils import UncertaintyLoss
from torch.nn.parallel import DistributedDataParallel
rank, size = engine.rank_and_size()
with engine.process_group('cpu'):
    torch.manual_seed(0)
    model = MTLNet(n_classes=4).eval()  # no dropout and no statistics of the batch
    objective = engine.Objective(model, UncertaintyLoss(MTLNet.tasks), bfloat16=False)
    image, bbox, mask = torch.randn(4, 3, 64, 64), torch.rand(4, 4).sort()[0], torch.ones(4, 1, 64, 64)
    label = torch.tensor([0, 1, -1, 3])
    bbox[1:], mask[::2] = torch.nan, torch.nan  # rank 0 has no mask and the only box
    wrapped = DistributedDataParallel(objective, find_unused_parameters=True) if size > 1 else objective
    wrapped([part[rank::size] for part in (image, bbox, label, mask)])[0].backward()
    if rank == 0:
        torch.save({name: p.grad for name, p in objective.named_parameters()}, sys.argv[1])
"""


def test_two_processes_have_the_gradient_of_one(tmp_path):
    """Also where a share has none of a task's labels."""
    script = tmp_path / 'shares.py'
    script.write_text(SHARES)
    together, alone = tmp_path / 'together.pt', tmp_path / 'alone.pt'
    subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2',
                    str(script), str(together)], check=True, capture_output=True, timeout=300)
    subprocess.run([sys.executable, str(script), str(alone)], check=True, timeout=300)
    together, alone = torch.load(together), torch.load(alone)
    assert together.keys() == alone.keys()
    for name in alone:
        torch.testing.assert_close(together[name], alone[name], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize('processes, batch_size', [(4, 3), (17, 17)])  # 36 samples in 3 batches of 12
def test_a_batch_for_fewer_samples_than_processes_is_refused(shared_data, tmp_path, monkeypatch, processes,
                                                             batch_size):
    monkeypatch.setattr(engine, 'rank_and_size', lambda: (0, processes))
    with pytest.raises(InputError, match=f'cannot be shared by {processes} processes'):
        train(shared_data, tmp_path, '--batch-size', str(batch_size))


def test_photographs_without_a_label_for_the_network_are_not_used(data, tmp_path):
    dataset = MTLDataset('train', root=data)
    dataset.labelled['mask'][:30] = False
    assert len(dataset.with_labels(UNet.tasks)) == 6
    assert len(dataset.with_labels(MTLNet.tasks)) == 36


def test_size_grows_to_the_images_own():
    sizes = [engine.training_size(epoch, 20, (256, 192)) for epoch in range(1, 21)]
    assert sizes == [(128, 96)] * 13 + [(192, 144)] * 6 + [(256, 192)]
    assert engine.training_size(1, 10, (64, 80)) == (64, 64)
    assert engine.training_size(1, 1, (256, 256)) == (128, 128)


@pytest.mark.parametrize('masks, times', [(36, 1), (12, 1), (11, 3), (1, 3), (0, 1)])
def test_photographs_with_a_mask_come_more_often_where_masks_are_rare(shared_data, masks, times):
    dataset = MTLDataset('train', root=shared_data)
    dataset.labelled['mask'][masks:] = False
    part = Subset(dataset, range(35, -1, -1))
    positions = engine.training_positions(part)
    counts = torch.bincount(torch.tensor(part.indices)[positions], minlength=36)
    assert counts.tolist() == [times] * masks + [1] * (36 - masks)


@pytest.mark.parametrize('content, message', [
    (b'', 'not a sound checkpoint'),
    (b'no model at all', 'not a sound checkpoint (File is not a zip file)'),
    ({'layer.weight': torch.zeros(3)}, 'another kind of PyTorch file'),
    (torch.zeros(3), 'another kind of PyTorch file'),
    ({'format': engine.TRAINING_FORMAT}, "the format 'segmentation-mtl training 2'; expected"),
    ({'format': engine.MODEL_FORMAT}, 'does not fit the networks'),
    ({'format': engine.MODEL_FORMAT, 'network': 'UNet', 'arguments': {}, 'weights': {}},
     'does not fit the networks'),
    (MTLNet(n_classes=2), 'holds more than plain weights'),  # a whole pickled module
])
def test_a_model_file_of_another_kind_is_refused(tmp_path, content, message):
    path = tmp_path / 'model.pt'
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(InputError) as error:
        engine.load_model(path)
    assert message in str(error.value) and str(path) in str(error.value)
    assert '\n' not in str(error.value)


def test_a_truncated_model_file_is_refused(shared_data, tmp_path):
    train(shared_data, tmp_path, '--limit-batches', '1', '--epochs', '1')
    whole = (tmp_path / 'best.pt').read_bytes()
    (tmp_path / 'best.pt').write_bytes(whole[:len(whole) // 2])
    with pytest.raises(InputError, match='not a sound checkpoint'):
        engine.load_model(tmp_path / 'best.pt')


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / 'created',)

    torch.save({'format': engine.MODEL_FORMAT, 'weights': Evil()}, tmp_path / 'evil.pt')
    with pytest.raises(InputError, match='not a sound checkpoint'):
        engine.load_model(tmp_path / 'evil.pt')
    assert not (tmp_path / 'created').exists()


def test_a_checkpoint_rebuilds_its_model_by_itself(shared_data, tmp_path):
    train(shared_data, tmp_path, '--limit-batches', '1', network=UNet)
    model = engine.load_model(tmp_path / 'best.pt')
    assert type(model) is UNet and not model.training
    assert model.image_size == (64, 64) and len(model.class_names) == 8


@pytest.mark.parametrize('spoil, message', [
    (lambda data: (data / 'val' / 'masks.h5').unlink(), 'val/masks.h5: no such file'),
    (lambda data: (data / 'train' / 'images.h5').write_bytes(b'x' * 5000), 'not a sound HDF5 file'),
])
def test_bad_data_stops_training_with_one_line(data, tmp_path, fails, spoil, message):
    spoil(data)
    assert message in fails(train_mtl.main, '--data', data, '--out', tmp_path / 'run')


def test_damage_found_by_a_worker_is_one_line_too(data, tmp_path, fails):
    path = data / 'train' / 'images.h5'
    data_rechunk.rechunk_file(path, checksums=True)
    with h5py.File(path) as file:
        offset = file['images'].id.get_chunk_info(7).byte_offset
    with open(path, 'r+b') as file:
        file.seek(offset + 100)
        file.write(b'damaged')
    line = fails(train_mtl.main, '--data', data, '--out', tmp_path / 'run', '--workers', '1')
    assert line.startswith('error: /') and 'sample 7 is damaged' in line


def test_splits_of_two_preparations_are_refused(data, tmp_path, fails):
    for path in (data / 'test').glob('*.h5'):
        with h5py.File(path, 'a') as file:
            file[path.stem].attrs['preparation'] = 'another'
    line = fails(train_mtl.main, '--data', data, '--out', tmp_path / 'run')
    assert 'do not belong together, their preparation differs' in line


def test_a_loss_that_is_not_finite_stops_before_anything_is_saved(shared_data, tmp_path, fails):
    train(shared_data, tmp_path, '--limit-batches', '1')
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    line = fails(train_mtl.main, '--data', shared_data, '--out', tmp_path, '--lr', '1e30',
                 '--model', tmp_path / 'model.pt', '--workers', 0)
    assert 'the loss is ' in line and 'mask ' in line and 'lower --lr' in line
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}


@pytest.mark.parametrize('network', [MTLNet, UNet])
def test_a_batch_that_lost_its_labels_in_a_crop_teaches_nothing(shared_data, network):
    sample = [part[None] for part in MTLDataset('train', root=shared_data)[0]]
    batch = sample[0], torch.full((1, 4), torch.nan), torch.tensor([-1]), torch.full((1, 1, 64, 64), torch.nan)
    model = network()
    total, losses = engine.Objective(model, WeightedLoss.equal(network.tasks), bfloat16=False)(batch)
    total.backward()
    assert total == 0 and losses == {} and all(p.grad.abs().max() == 0 for p in model.parameters())


@pytest.mark.parametrize('epochs', range(1, 8))
def test_any_number_of_steps_has_a_schedule(shared_data, tmp_path, epochs):
    options = arguments(shared_data, tmp_path)
    run = engine.Run(UNet, WeightedLoss.equal(UNet.tasks), MTLDataset('test', root=shared_data), epochs, options)
    for _ in range(epochs):
        run.optimizer.step()
        run.schedule.step()


@pytest.mark.parametrize('option', [
    ('--epochs', '0'), ('--epochs', 'abc'), ('--batch-size', '-4'), ('--lr', 'nan'), ('--lr', '-1'),
    ('--workers', '-1'), ('--seed', '-1'), ('--seed', '99999999999'), ('--limit-batches', '0'),
    ('--model', '.'),
])
def test_options_that_make_no_sense_are_refused(option, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        train_mtl.main([*option, '--out', str(tmp_path / 'run')])
    assert stopped.value.code == 2 and f"{option[0]}: '{option[1]}' is " in capsys.readouterr().err


def test_sizes_that_the_networks_cannot_take_are_refused(coursework, tmp_path, fails):
    root = coursework(size=(64, 72))
    data_rechunk.rechunk(root)
    line = fails(train_mtl.main, '--data', root, '--out', tmp_path / 'run')
    assert 'images of 72 x 64 pixels' in line


def test_cuda_without_a_device_is_refused(shared_data, tmp_path, fails, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    line = fails(train_mtl.main, '--data', shared_data, '--out', tmp_path, '--device', 'cuda')
    assert 'no CUDA device' in line
