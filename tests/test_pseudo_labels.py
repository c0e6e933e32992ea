"""Labels that the network finds itself."""

import itertools
import os
import shutil
import signal

import h5py
import numpy as np
import pytest
import torch
from conftest import read_checkpoints, same_bits, train
from torch import nn
from torch.utils.data import Subset

import data_rechunk
import engine
from dataloader_mtl import MTLDataset
from models import MTLNet, Outputs, UNet
from pseudo_labels import epoch_of_labels, unlabelled, write_pseudo_labels
from support.cli import InputError, Stopped

CPU = torch.device('cpu')


@pytest.fixture(scope='session')
def partly_labelled(shared_data, tmp_path_factory):
    """The shared data, of whose 36 training images the last 26 have no mask and the last 16 no box."""
    root = shutil.copytree(shared_data, tmp_path_factory.mktemp('partly') / 'data')
    for stem, value, first in ('masks', 255, 10), ('bboxes', np.nan, 20):
        path = root / 'train' / f'{stem}.h5'
        with h5py.File(path, 'r+') as file:
            file[stem][first:] = value
        data_rechunk.rechunk_file(path, force=True)
    return root


class HalfPet(nn.Module):
    """Logits of 3 (pet) in the left half, 1 in the third quarter, -3 in the last; the head is in a corner.

    `seen`: the images of each call.
    """

    tasks = MTLNet.tasks

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x, decode=None):
        self.seen.append(x)
        width = x.shape[-1]
        mask = torch.full((len(x), 1, *x.shape[-2:]), -3.0)
        mask[..., : width * 3 // 4], mask[..., : width // 2] = 1, 3
        return Outputs(None, mask, torch.tensor([0, 0, 0.25, 0.5]).repeat(len(x), 1))


def test_labels_are_made_after_shares_of_the_epochs():
    made = [epoch_of_labels(epoch, 10, (0.5, 0.75)) for epoch in range(1, 11)]
    assert made == [None] * 5 + [6, 6, 6, 9, 9]
    assert [epoch_of_labels(epoch, 2, (0.5, 0.75)) for epoch in (1, 2)] == [None, 2]
    assert epoch_of_labels(3, 3, ()) is None


def test_labels_are_what_the_network_is_sure_about(partly_labelled, tmp_path, monkeypatch):
    monkeypatch.setattr('pseudo_labels.FlipAveraged', lambda model: model)
    dataset, model, path = MTLDataset('train', root=partly_labelled, jitter=0.3, cutmix=1), HalfPet(), tmp_path / 'a.h5'
    write_pseudo_labels(path, 4, model, Subset(dataset, range(5, 30)), CPU, size=(64, 32))
    assert sum(map(len, model.seen)) == 20 and model.seen[0].shape[1:] == (3, 64, 32)
    plain = MTLDataset('train', root=partly_labelled)
    before, after = plain[[4, 9, 10, 29, 30]], plain
    after.use_pseudo_labels(path, 4)
    assert not plain.labelled['mask'][10:].any() and not plain.labelled['box'][20:].any()
    after = plain[[4, 9, 10, 29, 30]]
    assert torch.equal(after.image, before.image)
    torch.testing.assert_close(after.mask[[0, 1, 4]], before.mask[[0, 1, 4]], equal_nan=True)
    torch.testing.assert_close(after.bbox[[0, 1, 2, 4]], before.bbox[[0, 1, 2, 4]], equal_nan=True)
    columns = after.mask[2:4, 0, :, [10, 44, 60]]
    assert columns[..., 0].eq(1).all() and columns[..., 1].isnan().all() and columns[..., 2].eq(0).all()
    torch.testing.assert_close(after.bbox[3], torch.tensor([0, 0, 0.25, 0.5]))


def test_mixed_images_have_no_pseudo_label(partly_labelled, tmp_path):
    dataset = MTLDataset('train', root=partly_labelled, cutmix=1)
    write_pseudo_labels(tmp_path / 'a.h5', 1, HalfPet(), Subset(dataset, range(36)), CPU, size=(64, 64))
    dataset.use_pseudo_labels(tmp_path / 'a.h5', 1)
    batch = dataset[[8, 9, 10, 11, 12]]
    assert batch.mask.isnan().all(dim=(1, 2, 3)).tolist() == [False] * 2 + [True] * 3
    assert batch.bbox.isnan().all(dim=1).tolist() == [False] * 2 + [True] * 3


def test_labels_of_another_epoch_are_refused(partly_labelled, tmp_path):
    dataset = MTLDataset('train', root=partly_labelled)
    with pytest.raises(InputError, match='a.h5: not the pseudo-labels of epoch 3; start again with another --out'):
        dataset.use_pseudo_labels(tmp_path / 'a.h5', 3)
    write_pseudo_labels(tmp_path / 'a.h5', 2, HalfPet(), Subset(dataset, range(36)), CPU, size=(64, 64))
    with pytest.raises(InputError, match='not the pseudo-labels of epoch 3'):
        dataset.use_pseudo_labels(tmp_path / 'a.h5', 3)


def test_networks_without_the_task_need_no_labels(partly_labelled):
    part = Subset(MTLDataset('train', root=partly_labelled), range(12))
    assert unlabelled(part, MTLNet.tasks) == unlabelled(part, UNet.tasks) == [10, 11]
    assert unlabelled(part, ('class', 'box')) == unlabelled(part, ('class',)) == []


def test_training_with_pseudo_labels_resumes_bit_exactly(partly_labelled, tmp_path, monkeypatch):
    """In the middle of each of the two epochs at whose start labels are made."""
    monkeypatch.setattr('pseudo_labels.SURE', 0.5)
    original, options = torch.optim.AdamW.step, ('--epochs', 4)
    train(partly_labelled, tmp_path / 'whole', *options)
    for steps, epoch, more in (8, 3, ()), (3, 4, ('--resume',)):
        count = itertools.count(1)

        def step(*args, steps=steps, count=count, **kw):
            original(*args, **kw)
            if next(count) == steps:
                os.kill(os.getpid(), signal.SIGTERM)

        with monkeypatch.context() as patch:
            patch.setattr(torch.optim.AdamW, 'step', step)
            with pytest.raises(Stopped, match=f'in epoch {epoch}, after 2 steps'):
                train(partly_labelled, tmp_path / 'parts', *options, *more)
    train(partly_labelled, tmp_path / 'parts', *options, '--resume')
    assert same_bits(read_checkpoints(tmp_path / 'whole'), read_checkpoints(tmp_path / 'parts'))


def test_training_takes_masks_from_pseudo_labels(partly_labelled, tmp_path, monkeypatch):
    counts, forward = [], engine.forward

    def count_masks(model, batch):
        outputs, batch = forward(model, batch)
        counts[-1] += len(batch.mask) * model.training
        return outputs, batch

    def start_epoch(*args):
        counts.append(0)
        return evaluate(*args)

    evaluate = engine.train_one_epoch
    monkeypatch.setattr(engine, 'train_one_epoch', start_epoch)
    monkeypatch.setattr(engine, 'forward', count_masks)
    monkeypatch.setattr('pseudo_labels.SURE', 0.5)
    monkeypatch.setattr(engine, 'SCRATCH', engine.SCRATCH._replace(cutmix=0))
    train(partly_labelled, tmp_path, '--epochs', 2)
    assert counts == [20, 46]
