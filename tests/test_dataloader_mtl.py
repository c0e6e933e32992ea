"""MTLDataset: what a sample is, in every process, and what is refused at the door."""

import pickle
import re

import h5py
import numpy as np
import pytest
import torch
from conftest import change_h5, damage_sample, read_h5, run_in_child, with_row
from torch.utils.data import DataLoader, Subset
from torchvision import tv_tensors
from torchvision.transforms import v2

import data_rechunk
import dataloader_mtl
from dataloader_mtl import (
    MEAN,
    STD,
    MTLDataset,
    RandomCropFlip,
    count_known,
    draw_epoch,
    fill_in,
    load_splits,
    normalise,
    poor_light,
    remove_pets,
    split_batches,
    training_size,
    zoom_out,
)
from support import synthetic_pets
from support.cli import InputError
from support.device import seed_everything
from support.hdf5 import SHAPES
from utils import TASKS


def test_a_sample_is_image_box_label_and_mask(shared_data):
    dataset, folder = MTLDataset('train', root=shared_data), shared_data / 'train'
    images, masks, boxes, breeds = (read_h5(folder / f'{stem}.h5')[3] for stem in SHAPES if stem != 'binary')
    sample, (pixels, corners, _) = dataset[3], dataset.read([3])
    np.testing.assert_allclose(sample.image.permute(1, 2, 0), (images / 255 - MEAN) / STD, atol=1e-5)
    np.testing.assert_allclose(sample.bbox, boxes / 64, atol=1e-6)
    assert sample.label == breeds and np.array_equal(sample.mask[0], masks[..., 0])
    assert [part.dtype for part in sample] == [torch.float32, torch.float32, torch.int64, torch.uint8]
    assert [part.shape for part in sample] == [(3, 64, 64), (4,), (), (1, 64, 64)]
    assert np.array_equal(pixels[0].permute(1, 2, 0), images) and np.array_equal(corners[0], boxes)
    assert len(dataset) == 36 and dataset.split.image_size == (64, 64)


def test_unknown_mask_is_255_unknown_box_nan_and_unknown_label_minus_one(data):
    for stem, unknown in ('masks', 255), ('bboxes', np.nan), ('breeds', -1):
        change_h5(data / 'train' / f'{stem}.h5', with_row(0, unknown))
    change_h5(data / 'train' / 'masks.h5', with_row((1, slice(5)), 255))
    dataset = MTLDataset('train', root=data)
    _, bbox, label, mask = dataset[0]
    assert bbox.isnan().all() and label == -1 and (mask == 255).all()
    assert (dataset[1].mask[0, :5] == 255).all() and (dataset[1].mask[0, 5:] <= 1).all()
    assert {task: bool(known[0]) for task, known in dataset.split.known.items()} == dict.fromkeys(TASKS, False)
    assert dataset.with_labels(['mask', 'box']) == list(range(1, 36))


def test_species_of_a_class_is_that_of_all_its_training_samples(data):
    split = MTLDataset('train', root=data).split
    assert split.class_species == [('cat', 'dog')[breed.species] for breed in synthetic_pets.BREEDS]
    one = np.flatnonzero(split.labels == 0)[0]
    change_h5(data / 'train' / 'binary.h5', with_row(one, 1 - synthetic_pets.BREEDS[0].species))
    change_h5(data / 'train' / 'breeds.h5', with_row(split.labels == 1, -1))
    changed = [None, None, *split.class_species[2:]]
    assert MTLDataset('train', root=data).split.class_species == changed
    assert load_splits(data, ['class'])['test'].dataset.split.class_species == changed  # it may lack a class


def test_without_breeds_the_label_is_the_species(data):
    (data / 'train' / 'breeds.h5').unlink()
    split = MTLDataset('train', root=data).split
    assert split.class_names == split.class_species == ['cat', 'dog']
    assert split.labels.tolist() == read_h5(data / 'train' / 'binary.h5')[:, 0].tolist()


def test_samples_are_equal_for_all_stored_dtypes_and_boxes_relative_to_width_and_height(original_files, tmp_path):
    samples = []
    for dtype in 'uint8', 'float64':
        root = original_files(tmp_path / dtype, size=(64, 96), dtype=dtype)
        data_rechunk.rechunk(root)
        samples.append(MTLDataset('train', root=root)[5])
        stored = read_h5(root / 'train' / 'bboxes.h5')[5]
        np.testing.assert_allclose(samples[-1].bbox, stored / (96, 64, 96, 64), rtol=1e-6)
    for part in 'image', 'label', 'mask':
        assert torch.equal(*(getattr(sample, part) for sample in samples))
    assert set(samples[0].mask.unique().tolist()) == {0, 1}


@pytest.mark.parametrize('dtype', ['float32', 'float16'], ids=['read as stored', 'converted'])
def test_images_that_stay_float_are_scaled_as_0_to_255(data, dtype):
    path = data / 'train' / 'images.h5'
    change_h5(path, lambda images: with_row((0, 0, 0, 0), 99.5)(images.astype(dtype)))
    assert read_h5(path).dtype == dtype
    image = MTLDataset('train', root=data)[0].image
    assert image.dtype == torch.float32 and image[0, 0, 0] == pytest.approx((99.5 / 255 - MEAN[0]) / STD[0])
    assert MTLDataset('train', RandomCropFlip(64, 64), root=data)[0].image.std() > 0.5  # not cut off at 1


def test_files_are_opened_once_in_a_process_and_by_each_forked_one(shared_data, monkeypatch, tmp_path):
    dataset, opened, original = MTLDataset('test', root=shared_data), [], h5py.File
    first = dataset[0]
    monkeypatch.setattr(h5py, 'File', lambda *args, **kw: opened.append(args) or original(*args, **kw))
    dataset[0], dataset[1]
    assert not opened

    def read(_):
        assert all(torch.equal(one, two) for one, two in zip(dataset[0], first))
        dataset[1]
        assert len(opened) == 2

    assert run_in_child(read, [], tmp_path / 'log') == 0, (tmp_path / 'log').read_text()


def test_files_may_be_rechunked_and_not_replaced_by_others_while_they_are_in_use(data):
    """Each loading process opens them anew, in the second hour of a training, too."""
    dataset = MTLDataset('train', root=data)
    first = dataset[0]
    data_rechunk.rechunk_file(data / 'train' / 'images.h5', force=True)
    assert all(torch.equal(a, b) for a, b in zip(first, pickle.loads(pickle.dumps(dataset))[0]))
    change_h5(data / 'train' / 'images.h5', lambda images: 255 - images, preparation='of other photographs')
    with pytest.raises(InputError, match='images.h5: was replaced since this run began'):
        pickle.loads(pickle.dumps(dataset))[0]


def test_files_without_a_preparation_may_not_be_replaced_at_all_while_they_are_in_use(original_files):
    root = original_files()
    data_rechunk.rechunk(root)
    dataset = MTLDataset('train', root=root)
    data_rechunk.rechunk_file(root / 'train' / 'images.h5', force=True)
    with pytest.raises(InputError, match='was replaced since this run began'):
        pickle.loads(pickle.dumps(dataset))[0]


def test_file_not_written_by_data_rechunk_asks_to_run_it(data):
    """Its structure need have no checksums."""
    path = data / 'train' / 'masks.h5'
    masks = read_h5(path)
    with h5py.File(path, 'w', libver='earliest') as file:
        file.create_dataset('masks', data=masks, chunks=(1, 64, 64, 1))
        file['chunked_masks'], file['known_masks'] = file['masks'], np.ones(36, 'uint8')
    with pytest.raises(InputError, match='masks.h5: not as data_rechunk.py stores it; run python data_rechunk.py'):
        MTLDataset('train', root=data)


@pytest.mark.parametrize('value', [7, h5py.Empty('f'), [''] * 8, ['a\x1b[2J'] * 8, ['a' * 101] * 8, [b'caf\xe9'] * 8])
def test_breeds_without_names_that_can_be_printed_are_refused(data, value):
    with h5py.File(data / 'train' / 'breeds.h5', 'r+') as file:
        file['breeds'].attrs['class_names'] = value
    with pytest.raises(InputError, match="breeds.h5: no attribute 'class_names' with the breeds' names, each of 1 to"):
        MTLDataset('train', root=data)


# ---- augmentation


@pytest.mark.parametrize('size', [(48, 80), (128, 32)])
@pytest.mark.parametrize('dtype', [torch.uint8, torch.float32])
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_random_crop_flip_is_that_of_torchvision_bit_for_bit(size, dtype, layout):
    torch.manual_seed(0)
    images = torch.randint(0, 256, (12, 3, 60, 90), dtype=torch.uint8).contiguous(memory_format=layout)
    images = v2.functional.to_dtype(images, dtype, scale=True)
    masks = torch.randint(0, 2, (12, 1, 60, 90), dtype=torch.uint8)
    masks[1, :, :30], masks[5] = 255, 255
    boxes = torch.rand(12, 4).view(12, 2, 2).sort(dim=1)[0].flatten(1) * torch.tensor([90, 60, 90, 60])
    boxes[7] = torch.nan
    transform = RandomCropFlip(*size)
    crops, flips = transform.draw(images)
    crops[0], crops[1] = torch.tensor([[0, 0, 60, 90], [5, 0, 1, 90]])
    assert flips.any() and not flips.all()
    found = transform.apply(images, boxes, masks, crops, flips)
    for row, (crop, flip) in enumerate(zip(crops.tolist(), flips)):
        parts = (
            tv_tensors.Image(images[row]),
            tv_tensors.BoundingBoxes(boxes[row], format='XYXY', canvas_size=(60, 90), clamping_mode=None),
            tv_tensors.Image(masks[row]),
        )
        modes = {'antialias': True}, {}, {'interpolation': v2.InterpolationMode.NEAREST_EXACT}
        image, bbox, mask = (v2.functional.resized_crop(part, *crop, size, **mode) for part, mode in zip(parts, modes))
        if flip:
            image, bbox, mask = map(v2.functional.horizontal_flip, (image, bbox, mask))
        assert found[0].dtype == dtype and torch.equal(found[0][row], image)
        bbox = bbox.as_subclass(torch.Tensor)[0]
        torch.testing.assert_close(found[1][row], bbox, equal_nan=True, atol=1e-4, rtol=1e-5)
        assert found[2].dtype == torch.uint8 and torch.equal(found[2][row], mask)
    assert found[1][7].isnan().all() and not found[1][:7].isnan().any() and (found[2][5] == 255).all()


@pytest.mark.parametrize(
    'box, left, width, expected',
    [
        ((20, 16, 50, 32), 10, 40, [10 / 40, 1 / 4, 1, 1 / 2]),  # the whole box
        ((20, 16, 50, 32), 3, 40, [17 / 40, 1 / 4, 1, 1 / 2]),  # 23 of its 30 pixels, 0.77
        ((20, 16, 50, 32), 2, 40, [np.nan] * 4),  # 22, 0.73
        ((20, 16, 50, 32), 24, 40, [0, 1 / 4, 26 / 40, 1 / 2]),  # 26
        ((10, 10, 11, 40), 0, 64, [10 / 64, 10 / 64, 11 / 64, 40 / 64]),  # small, and whole
    ],
)
def test_box_of_which_a_crop_leaves_too_little_is_dropped_and_others_end_at_its_border(
    shared_data, box, left, width, expected
):
    crop, flip = torch.tensor([[0, left, 64, width]]), torch.tensor([False])
    dataset = MTLDataset('train', lambda *parts: RandomCropFlip(64, 64).apply(*parts, crop, flip), root=shared_data)
    dataset.split.bboxes[0] = box
    assert dataset[0].bbox.tolist() == pytest.approx(expected, abs=1e-5, nan_ok=True)


# ---- batches and pixels


def test_a_batch_holds_the_samples_of_its_indices(shared_data):
    dataset, indices = MTLDataset('train', root=shared_data), [5, 2, 30, 4, 0]
    dataset.split.known['mask'][2], dataset.split.bboxes[4] = False, np.nan
    batches = [
        dataset[indices],
        next(iter(DataLoader(dataset, batch_sampler=[indices]))),
        Subset(dataset, [0, 4, 30, 2, 5])[[4, 3, 2, 1, 0]],
    ]
    for batch in batches:
        for position, index in enumerate(indices):
            for one, two in zip(dataset[index], batch):
                assert torch.equal(one.nan_to_num(-1), two[position].nan_to_num(-1))
    assert torch.equal(dataset[-6].image, dataset[30].image)
    with pytest.raises(IndexError):
        dataset[36]


def red_squares():
    """Four grey images of 64 x 64 with a red pet of 32 x 32, its box and a label; of the last the mask is unknown."""
    images = torch.linspace(0.2, 0.8, 4)[:, None, None, None].expand(4, 3, 64, 64).clone()
    masks = torch.zeros(4, 1, 64, 64, dtype=torch.uint8)
    images[:, :, 16:48, 8:40], masks[:, :, 16:48, 8:40] = torch.tensor([1.0, 0, 0])[:, None, None], 1
    masks[3] = 255
    return images, torch.tensor([[8 / 64, 16 / 64, 40 / 64, 48 / 64]]).repeat(4, 1), torch.arange(4), masks


def test_zoom_out_moves_a_smaller_pet_with_mask_and_box_to_the_background_of_the_next_image():
    images, boxes, labels, masks = red_squares()
    seed_everything(0)
    found = zoom_out(images, boxes, labels, masks, share=1, scale=(0.5, 0.5))
    new_images, new_boxes, new_labels, new_masks = found
    assert torch.equal(new_labels, labels)
    for row in 0, 1:
        y, x = torch.nonzero(new_masks[row, 0]).T
        assert (y.max() - y.min(), x.max() - x.min()) == (15, 15) and (new_masks[row] == 1).sum() == 16 * 16
        left, top, right, bottom = (64 * new_boxes[row]).round().int().tolist()
        assert (left, top, right, bottom) == (x.min(), y.min(), x.max() + 1, y.max() + 1)
        red = torch.tensor([1.0, 0, 0])[:, None, None]
        assert torch.allclose(new_images[row, :, y.min() + 1 : y.max(), x.min() + 1 : x.max()], red)
        far = new_images[row].clone()  # the next image's own pet has gone
        far[:, y.min() - 1 : y.max() + 2, x.min() - 1 : x.max() + 2] = images[row + 1, 0, 0, 0]
        torch.testing.assert_close(far, images[row + 1, :, :1, :1].expand(3, 64, 64))
    for new, old in zip(found, (images, boxes, labels, masks)):
        assert torch.equal(new[2:], old[2:])  # its next image's mask is unknown, or its own


def test_zoom_out_with_several_leaves_the_other_pet_and_neither_box_nor_label():
    images, boxes, labels, masks = red_squares()
    images[0, :, 16:48, 8:40] = torch.tensor([0, 1.0, 0])[:, None, None]
    seed_everything(0)
    new_images, new_boxes, new_labels, new_masks = zoom_out(
        images, boxes, labels, masks, share=1, several=1, scale=(0.5, 0.5)
    )
    assert new_boxes[:2].isnan().all() and new_labels.tolist() == [-1, -1, 2, 3]
    red, green = new_images[0, 0] > 0.9, new_images[0, 1] > 0.9
    assert 14 * 14 <= green.sum() <= 16 * 16 and red.sum() >= 32 * 32 - 18 * 18
    pets = new_masks[0, 0] == 1
    assert pets[red | green].all() and pets[masks[1, 0] == 1].all() and pets.sum() <= 32 * 32 + 16 * 16


def test_zoom_out_leaves_an_image_without_a_pet_as_it_is():
    images, boxes, labels, masks = red_squares()
    masks[0] = 0
    changed = zoom_out(images, boxes, labels, masks, share=1)
    assert all(torch.equal(new[0], old[0]) for new, old in zip(changed, (images, boxes, labels, masks)))
    assert not torch.equal(changed[0][1], images[1])


def test_zoom_out_remove_pets_and_poor_light_change_a_share_of_the_images():
    images, boxes, labels, masks = (each[:1].repeat(200, *(each.ndim - 1) * [1]) for each in red_squares())
    seed_everything(0)
    _, _, new_labels, new_masks = zoom_out(images, boxes, labels, masks, share=0.25, several=0.4)
    smaller = (new_masks != masks).flatten(1).any(dim=1)
    assert 10 < (new_labels < 0).sum() < 0.6 * smaller.sum()
    removed = remove_pets(images, boxes, labels, masks, share=0.25)[2] < 0
    found = poor_light(images, share=0.25)
    dark = (found != images).flatten(1).any(dim=1)
    assert all(30 < changed.sum() < 70 for changed in (smaller, removed, dark))
    light = found[dark].mean(dim=(1, 2, 3)) / images.mean()
    assert light.max() < 1.05 and (light < 0.5).sum() > 5


def test_remove_pets_leaves_background_without_labels_and_images_with_a_large_pet_or_an_unknown_pixel():
    images, boxes, labels, masks = red_squares()
    masks[2], masks[3] = 0, masks[0]
    masks[2, :, :40], masks[3, 0, 0, 0] = 1, 255
    found = remove_pets(images, boxes, labels, masks, share=1)
    for new, old in zip(found, (images, boxes, labels, masks)):
        assert torch.equal(new[2:], old[2:])
    new_images, new_boxes, new_labels, new_masks = found
    torch.testing.assert_close(new_images[:2], images[:2, :, :1, :1].expand(2, 3, 64, 64))
    assert new_boxes[:2].isnan().all() and new_labels[:2].tolist() == [-1, -1] and not new_masks[:2].any()


def test_what_fill_in_fills_in_comes_from_around():
    images = torch.linspace(0, 1, 48).expand(1, 3, 48, 48).clone()
    keep = torch.ones(1, 1, 48, 48)
    keep[:, :, 10:30, 20:30] = 0
    damaged = torch.where(keep > 0, images, 99.0)
    found = fill_in(damaged, keep)
    assert torch.equal(torch.where(keep > 0, found, images), images) and (found - images).abs().max() < 0.15
    assert fill_in(images, torch.zeros_like(keep)).isfinite().all()


def test_a_dataset_zooms_out_removes_pets_and_darkens(shared_data):
    kinds = {}, {'zoom_out': 1}, {'remove_pets': 1}, {'poor_light': 1}
    seed_everything(0)
    plain, small, empty, dark = (MTLDataset('train', root=shared_data, **kind)[[0, 1]] for kind in kinds)
    assert small.mask.sum() < plain.mask.sum()
    assert not empty.mask.any() and empty.bbox.isnan().all() and empty.label.tolist() == [-1, -1]
    assert dark.image.mean() < plain.image.mean() and torch.equal(dark.mask, plain.mask)


@pytest.mark.parametrize('dtype', [torch.uint8, torch.float32])
def test_normalise_takes_bytes_and_floats_and_leaves_its_input_as_it_is(dtype):
    images = v2.functional.to_dtype(torch.arange(90, dtype=torch.uint8).view(2, 3, 3, 5), dtype, scale=True)
    before = images.clone()
    mean, std = (torch.tensor(each)[:, None, None] for each in (MEAN, STD))
    expected = (torch.arange(90).view(2, 3, 3, 5) / 255 - mean) / std
    torch.testing.assert_close(normalise(images), expected)
    assert torch.equal(images, before)


@pytest.mark.parametrize(
    'stem, change, message',
    [
        ('bboxes', lambda boxes: boxes[:-1], 'lengths differ: images 36, masks 36, bboxes 35'),
        ('masks', lambda masks: masks[:, :32], 'sizes differ: images (64, 64), masks (32, 64)'),
        ('bboxes', lambda boxes: boxes / 64, 'bboxes.h5: no coordinate is above 1; boxes are expected in pixels'),
        ('binary', with_row(4, 2), 'binary.h5: sample 4 has label 2; expected a whole number from 0 to 1'),
        ('breeds', with_row(7, 8), 'breeds.h5: sample 7 has label 8; expected a whole number from 0 to 7'),
        ('bboxes', with_row(4, [40, 5, 30, 60]), 'bboxes.h5: sample 4 has the box'),
        ('bboxes', with_row(4, [0, 0, 70, 60]), 'expected xmin < xmax and ymin < ymax within an image of 64 x 64'),
    ],
)
def test_files_that_do_not_belong_together_and_values_out_of_range_are_refused(data, stem, change, message):
    change_h5(data / 'train' / f'{stem}.h5', change)
    with pytest.raises(InputError, match=re.escape(message)):
        MTLDataset('train', root=data)


def test_files_of_two_preparations_are_refused(data):
    change_h5(data / 'train' / 'bboxes.h5', lambda boxes: boxes, preparation='another')
    with pytest.raises(InputError, match='preparations differ'):
        MTLDataset('train', root=data)


def test_opening_reads_no_mask(data):
    path = data / 'train' / 'masks.h5'
    change_h5(path, with_row(slice(3, 5), 255))
    data_rechunk.rechunk_file(path, checksums=True)
    for number in range(36):
        damage_sample(path, number)
    dataset = MTLDataset('train', root=data)
    assert np.flatnonzero(~dataset.split.known['mask']).tolist() == [3, 4]
    with pytest.raises(InputError, match='masks.h5: sample 0 is damaged'):
        dataset[0]


def test_images_without_a_label_for_the_network_are_not_used_and_masks_can_be_left_out(shared_data):
    splits = load_splits(shared_data, ['mask'], masks=6)
    kept = splits['train'].indices
    assert len(kept) == 6 and len(splits['val']) == 12
    assert kept == load_splits(shared_data, ['mask'], masks=6)['train'].indices
    splits = load_splits(shared_data, ['mask', 'class'], masks=6)
    assert count_known(splits['train']) == {'images': 36, 'mask': 6, 'class': 36, 'box': 36}
    masks = splits['train'].dataset[list(range(36))].mask
    assert [row for row in range(36) if (masks[row] != 255).any()] == kept


def test_an_epoch_is_one_shuffle_or_as_many_batches_as_asked_for(shared_data):
    subset = Subset(MTLDataset('train', root=shared_data), range(10))
    once = draw_epoch(subset, 4, seed=0, epoch=1)
    assert sorted(sum(once.batches, [])) == list(range(10)) and len(once) == 3
    asked = draw_epoch(subset, 4, seed=0, epoch=1, steps=6)
    counts = np.bincount(sum(asked.batches, []))
    assert [len(batch) for batch in asked.batches] == [4] * 6 and set(counts) == {2, 3}
    assert asked.batches != draw_epoch(subset, 4, seed=0, epoch=2, steps=6).batches


def test_size_grows_with_the_epochs():
    shares = (0.4, 3 / 8), (0.8, 1 / 2), (1, 3 / 4)
    sizes = [training_size(epoch, 20, (256, 192), shares) for epoch in range(1, 21)]
    assert sizes == [(96, 64)] * 8 + [(128, 96)] * 8 + [(192, 144)] * 4
    assert training_size(1, 10, (64, 80), shares) == (64, 64)
    assert training_size(1, 1, (256, 256), shares) == (96, 96)


@pytest.mark.parametrize('size', [2, 3])
@pytest.mark.parametrize('count, batch_size', [(36, 16), (37, 5), (16, 16), (7, 4)])
def test_ranks_share_each_batch_and_give_each_sample_once(monkeypatch, size, count, batch_size):
    order, shares = torch.randperm(count), []
    monkeypatch.setattr(dataloader_mtl, 'get_world_size', lambda: size)
    for rank in range(size):
        monkeypatch.setattr(dataloader_mtl, 'get_rank', lambda rank=rank: rank)
        shares.append(split_batches(order, batch_size))
    assert sorted(i for share in shares for batch in share for i in batch) == list(range(count))
    assert len({len(share) for share in shares}) == 1
    totals = [sum(map(len, batches)) for batches in zip(*shares)]
    assert max(totals) <= batch_size and max(totals) - min(totals) <= 1
