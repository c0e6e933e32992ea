"""Training, evaluation and checkpoints."""

import csv
import json
import math
import pickle
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Subset

import data_rechunk
import engine
import train_mtl
from data_rechunk import InputError
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
    assert {name: figures[name] for name in METRICS} == dict.fromkeys(METRICS, 1)


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
        assert {k: other[k] for k in METRICS} == {k: found[0][k] for k in METRICS}
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
    assert metrics['data']['test'] == {'images': 12, 'class': 12, 'mask': 12, 'box': 12}
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
    for number, (seed, workers) in enumerate([(1, 1), (1, 0), (2, 0)]):
        out = tmp_path / str(number)
        train(shared_data, out, '--seed', str(seed), '--workers', str(workers), '--limit-batches', '2')
        weights.append(torch.load(out / 'best.pt', weights_only=True)['weights'])
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not all(torch.equal(weights[0][name], weights[2][name]) for name in weights[0])


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


def test_what_the_first_process_cannot_do_ends_all_of_them(monkeypatch):
    def fail():
        raise FileExistsError(17, 'File exists', 'README.md')

    with pytest.raises(FileExistsError):
        engine.first_process_does(fail)
    monkeypatch.setattr(engine, 'rank_and_size', lambda: (1, 2))
    monkeypatch.setattr(engine, 'gathered', lambda value: [(None, 'README.md: File exists'), value])
    with pytest.raises(InputError, match='README.md: File exists'):
        engine.first_process_does(fail)


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
        alone = engine.evaluate(load_model(out / name / 'best.pt'), dataset, torch.device('cpu'))
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


@pytest.mark.parametrize('content, message', [
    (b'', 'not a sound checkpoint'),
    (b'no model at all', 'not a sound checkpoint (File is not a zip file)'),
    ({'layer.weight': torch.zeros(3)}, 'another kind of PyTorch file'),
    (torch.zeros(3), 'another kind of PyTorch file'),
    ({'format': TRAINING_FORMAT}, f"the format '{TRAINING_FORMAT}'; expected"),
    ({'format': MODEL_FORMAT}, 'does not fit the networks'),
    ({'format': MODEL_FORMAT, 'network': 'UNet', 'arguments': {}, 'weights': {}},
     'does not fit the networks'),
    (MTLNet(n_classes=2), 'holds more than plain weights'),  # a whole pickled module
])
def test_a_model_file_of_another_kind_is_refused(tmp_path, content, message):
    path = tmp_path / 'model.pt'
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(InputError) as error:
        load_model(path)
    assert message in str(error.value) and str(path) in str(error.value)
    assert '\n' not in str(error.value)


def test_a_truncated_model_file_is_refused(shared_data, tmp_path):
    train(shared_data, tmp_path, '--limit-batches', '1', '--epochs', '1')
    whole = (tmp_path / 'best.pt').read_bytes()
    (tmp_path / 'best.pt').write_bytes(whole[:len(whole) // 2])
    with pytest.raises(InputError, match='not a sound checkpoint'):
        load_model(tmp_path / 'best.pt')


@pytest.mark.parametrize('write', [
    lambda content, path: torch.save({'format': MODEL_FORMAT, 'weights': content}, path),
    lambda content, path: torch.save({'format': MODEL_FORMAT, 'weights': content}, path,
                                     _use_new_zipfile_serialization=False),
    lambda content, path: path.write_bytes(pickle.dumps(content)),
], ids=['zip', 'legacy', 'pickle'])
def test_a_pickle_that_runs_code_is_refused(tmp_path, write):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / 'created',)

    write(Evil(), tmp_path / 'evil.pt')
    for kind in MODEL_FORMAT, TRAINING_FORMAT:
        with pytest.raises(InputError, match='evil.pt: not a sound checkpoint .*; expected'):
            load_checkpoint(tmp_path / 'evil.pt', kind)
    assert not (tmp_path / 'created').exists()


@pytest.fixture(scope='module')
def trained(shared_data, tmp_path_factory):
    """The folder of a run of one epoch, not to be changed."""
    out = tmp_path_factory.mktemp('trained')
    train(shared_data, out, '--epochs', '1', '--limit-batches', '1')
    return out


def test_a_changed_byte_in_a_checkpoint_is_noticed(trained, tmp_path):
    content = bytearray((trained / 'best.pt').read_bytes())
    content[len(content) // 2] ^= 4
    (tmp_path / 'model.pt').write_bytes(content)
    with pytest.raises(InputError, match='model.pt: not a sound checkpoint .its part .* is damaged'):
        load_model(tmp_path / 'model.pt')


def test_a_checkpoint_that_would_unpack_to_more_than_its_size_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / 'model.pt', 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('archive/data.pkl', bytes(10_000_000))
    with pytest.raises(InputError, match='a compressed archive'):
        load_model(tmp_path / 'model.pt')


@pytest.mark.parametrize('entry, value', [
    ('format', torch.zeros(3)), ('network', 'Encoder'), ('network', ['MTLNet']), ('class_names', 'abcdefgh'),
    ('class_names', [1] * 8), ('class_names', ['a'] * 7), ('class_names', []), ('class_names', ['\ud800'] * 8),
    ('class_names', ['a' * 10**6] * 8), ('network', ('MTLNet',)), ('image_size', [65, 64]), ('image_size', [10**6, 10**6]),
    ('image_size', [64.0, 64]), ('arguments', {'c_in': 3, 'c_out_seg': 1, 'n_classes': 10**12}), ('weights', None),
])
def test_a_model_file_with_an_impossible_entry_is_refused(trained, tmp_path, entry, value):
    content = torch.load(trained / 'best.pt', weights_only=True)
    torch.save(content | {entry: value}, tmp_path / 'model.pt')
    with pytest.raises(InputError, match='model.pt: (does not fit the networks|another kind of PyTorch file)'):
        load_model(tmp_path / 'model.pt')


@pytest.mark.parametrize('change', [
    lambda weight: weight * torch.nan, lambda weight: weight.double(), lambda weight: weight[..., None],
    lambda weight: weight.to_sparse(), lambda weight: weight.tolist(),
], ids=['NaN', 'double', 'shape', 'sparse', 'list'])
def test_weights_that_are_no_weights_are_refused(trained, tmp_path, change):
    content = torch.load(trained / 'best.pt', weights_only=True)
    name = next(iter(content['weights']))
    content['weights'][name] = change(content['weights'][name])
    torch.save(content, tmp_path / 'model.pt')
    with pytest.raises(InputError, match='model.pt: does not fit the networks'):
        load_model(tmp_path / 'model.pt')


def test_a_checkpoint_rebuilds_its_model_by_itself(shared_data, tmp_path):
    train(shared_data, tmp_path, '--limit-batches', '1', network=UNet)
    model = load_model(tmp_path / 'best.pt')
    assert type(model) is UNet and not model.training
    assert model.image_size == (64, 64) and len(model.class_names) == 8


@pytest.mark.parametrize('spoil, message', [
    (lambda data: (data / 'val' / 'masks.h5').unlink(), 'val/masks.h5: no such file'),
    (lambda data: (data / 'train' / 'images.h5').write_bytes(b'x' * 5000), 'not a sound HDF5 file'),
])
def test_bad_data_stops_training_with_one_line(data, tmp_path, error_line, spoil, message):
    spoil(data)
    assert message in error_line(train_mtl.main, '--data', data, '--out', tmp_path / 'run')


def test_damage_found_by_a_worker_is_one_line_too(data, tmp_path, error_line):
    path = data / 'train' / 'images.h5'
    data_rechunk.rechunk_file(path, checksums=True)
    with h5py.File(path) as file:
        offset = file['images'].id.get_chunk_info(7).byte_offset
    with open(path, 'r+b') as file:
        file.seek(offset + 100)
        file.write(b'damaged')
    line = error_line(train_mtl.main, '--data', data, '--out', tmp_path / 'run', '--workers', '1')
    assert line.startswith('error: /') and 'sample 7 is damaged' in line


def test_splits_of_two_preparations_are_refused(data, tmp_path, error_line):
    for path in (data / 'test').glob('*.h5'):
        with h5py.File(path, 'a') as file:
            file[path.stem].attrs['preparation'] = 'another'
    line = error_line(train_mtl.main, '--data', data, '--out', tmp_path / 'run')
    assert 'do not belong together, their preparation differs' in line


def test_a_loss_that_is_not_finite_stops_before_anything_is_saved(shared_data, tmp_path, error_line):
    train(shared_data, tmp_path, '--limit-batches', '1')
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    line = error_line(train_mtl.main, '--data', shared_data, '--out', tmp_path, '--lr', '1e30',
                 '--model', tmp_path / 'model.pt', '--workers', 0, '--batch-size', 4, '--checkpoint-minutes', '1e-9')
    found = re.search(r'epoch 1/30, step (\d+) of 9: the loss is \S+ \(mask .*class .*box .*\) for the samples '
                      r'(\d+) (\d+) (\d+) (\d+) of .*/train; .* try a lower --lr', line)
    assert found, line
    order = torch.Generator().manual_seed(seed_everything(0, 1))
    batch = torch.randperm(36, generator=order)[4 * (int(found[1]) - 1):][:4]
    assert sorted(batch.tolist()) == [int(number) for number in found.groups()[1:]]
    kept = {path: path.read_bytes() for path in before if path.name in ('best.pt', 'curves.png', 'log.csv')}
    assert kept.items() <= before.items()
    last = torch.load(tmp_path / 'last.pt', weights_only=True)
    assert all(tensor.isfinite().all() for part in ('model', 'average') for tensor in last[part].values())


@pytest.mark.parametrize('more', [(), ('--limit-batches', '3', '--batch-size', '5', '--checkpoint-minutes', '1e-9')],
                         ids=['at the end of the epoch', 'within it'])
def test_weights_that_are_not_finite_replace_none_that_are(shared_data, tmp_path, monkeypatch, more):
    """The loss of a step is finite, and what it makes of the weights is not."""
    train(shared_data, tmp_path, '--limit-batches', '1')
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    step = torch.optim.AdamW.step

    def overflow(self, *args, **kw):
        step(self, *args, **kw)
        self.param_groups[0]['params'][0].data[0] = math.inf

    monkeypatch.setattr(torch.optim.AdamW, 'step', overflow)
    with pytest.raises(InputError, match='epoch 1, step 1: the loss was finite and the weights are not'):
        train(shared_data, tmp_path, '--limit-batches', '1', *more)
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}


def without(root, split, stem, value):
    """Take a label from each sample of a split."""
    with h5py.File(root / split / f'{stem}.h5', 'r+') as file:
        file[stem][:] = np.full(file[stem].shape, value, file[stem].dtype)


@pytest.mark.parametrize('split, stem, value, network', [
    ('train', 'bboxes', np.nan, MTLNet), ('train', 'breeds', -1, MTLNet), ('train', 'masks', 255, MTLNet),
    ('val', 'masks', 255, UNet), ('test', 'masks', 255, UNet), ('val', 'bboxes', np.nan, MTLNet),
])
def test_a_split_without_any_label_of_a_task_trains(data, tmp_path, split, stem, value, network):
    without(data, split, stem, value)
    metrics = train(data, tmp_path / 'run', '--limit-batches', '1', network=network)
    figures = {'masks': 'dice', 'bboxes': 'box_iou', 'breeds': 'accuracy'}
    assert (figures[stem] in metrics['validation']) == (split != 'val')
    assert (figures[stem] in metrics['test']) == (split != 'test')


def test_a_class_that_training_does_not_have_is_one_of_the_models(data, tmp_path):
    with h5py.File(data / 'train' / 'breeds.h5', 'r+') as file:
        labels = file['breeds'][()]
        labels[labels == 7] = 2
        file['breeds'][:] = labels
    metrics = train(data, tmp_path / 'run', '--limit-batches', '1')
    assert 'accuracy' in metrics['test']
    assert len(load_model(tmp_path / 'run' / 'best.pt').class_names) == 8


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


def test_sizes_that_the_networks_cannot_take_are_refused(original_files, tmp_path, error_line):
    root = original_files(size=(64, 72))
    data_rechunk.rechunk(root)
    line = error_line(train_mtl.main, '--data', root, '--out', tmp_path / 'run')
    assert 'images of 72 x 64 pixels' in line


def test_cuda_without_a_device_is_refused(shared_data, tmp_path, error_line, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    line = error_line(train_mtl.main, '--data', shared_data, '--out', tmp_path, '--device', 'cuda')
    assert 'no CUDA device' in line
