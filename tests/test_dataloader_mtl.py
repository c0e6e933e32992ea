"""MTLDataset: what a sample is, in every process, and what is refused at the door."""

import multiprocessing
import pickle
import re

import h5py
import numpy as np
import pytest
import torch
from conftest import change_h5, damage_sample, read_h5, with_row
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
    colour_jitter,
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


def test_a_sample_is_image_box_label_and_mask(shared_data):
    dataset = MTLDataset('train', root=shared_data)
    image, bbox, label, mask = dataset[3]
    stored = {
        stem: read_h5(shared_data / 'train' / f'{stem}.h5')[3] for stem in ('images', 'bboxes', 'breeds', 'masks')
    }
    expected = (stored['images'] / 255 - MEAN) / STD
    np.testing.assert_allclose(image.permute(1, 2, 0), expected, atol=1e-5)
    np.testing.assert_allclose(bbox, stored['bboxes'] / 64, atol=1e-6)
    assert label == stored['breeds'] and label.dtype == torch.int64 and label.ndim == 0
    np.testing.assert_array_equal(mask[0], stored['masks'][..., 0])
    assert [t.dtype for t in (image, bbox, mask)] == [torch.float32, torch.float32, torch.uint8]
    assert [type(t) for t in (image, bbox, label, mask)] == [torch.Tensor] * 4
    assert len(dataset) == 36 and dataset.split.image_size == (64, 64)
    images, bboxes, masks = dataset.read([3])
    assert np.array_equal(images[0].permute(1, 2, 0), stored['images']) and images.dtype == torch.uint8
    assert np.array_equal(bboxes[0], stored['bboxes']) and torch.equal(masks[0], mask)


@pytest.mark.parametrize('transform', [None, RandomCropFlip(48, 64)], ids=['as stored', 'augmented'])
def test_unknown_mask_is_255_unknown_box_nan_and_unknown_label_minus_one(data, transform):
    for stem, unknown in ('masks', 255), ('bboxes', np.nan), ('breeds', -1):
        change_h5(data / 'train' / f'{stem}.h5', with_row(0, unknown))
    change_h5(data / 'train' / 'masks.h5', with_row((1, slice(5)), 255))
    dataset = MTLDataset('train', transform, root=data)
    _, bbox, label, mask = dataset[0]
    assert bbox.isnan().all() and label == -1 and (mask == 255).all()
    assert (dataset[2].mask <= 1).all()
    if transform is None:
        assert (dataset[1].mask[0, :5] == 255).all() and (dataset[1].mask[0, 5:] <= 1).all()
    assert [bool(dataset.split.known[task][0]) for task in ('mask', 'class', 'box')] == [False] * 3
    assert dataset.with_labels(['mask', 'box']) == list(range(1, 36))


def test_species_of_a_class_is_that_of_all_its_samples(data):
    split = MTLDataset('train', root=data).split
    assert split.class_species == [('cat', 'dog')[breed.species] for breed in synthetic_pets.BREEDS]
    one = np.flatnonzero(split.labels == 0)[0]
    change_h5(data / 'train' / 'binary.h5', with_row(one, 1 - synthetic_pets.BREEDS[0].species))
    change_h5(data / 'train' / 'breeds.h5', with_row(split.labels == 1, -1))
    changed = MTLDataset('train', root=data).split.class_species
    assert changed[:2] == [None, None] and changed[2:] == split.class_species[2:]


def test_the_label_is_the_breed_where_there_is_one_and_the_species_elsewhere(data, original_files):
    assert len(MTLDataset('train', root=data).split.class_names) == 8
    (data / 'train' / 'breeds.h5').unlink()
    species = MTLDataset('train', root=data).split
    assert species.class_names == species.class_species == ['cat', 'dog']
    assert species.labels.tolist() == read_h5(data / 'train' / 'binary.h5')[:, 0].tolist()
    root = original_files()
    data_rechunk.rechunk(root)
    assert MTLDataset('train', root=root).split.class_names == ['cat', 'dog']


def test_samples_are_equal_for_all_stored_dtypes(original_files, tmp_path):
    samples = []
    for dtype in 'uint8', 'float32', 'float64':
        root = original_files(tmp_path / dtype, dtype=dtype)
        data_rechunk.rechunk(root)
        samples.append(MTLDataset('train', root=root)[5])
    for other in samples[1:]:
        for part in 'image', 'label', 'mask':
            assert torch.equal(getattr(samples[0], part), getattr(other, part))
        assert torch.allclose(samples[0].bbox, other.bbox, atol=1 / 64)  # whole pixels in uint8
    assert set(samples[0].mask.unique().tolist()) == {0, 1}


@pytest.mark.parametrize('dtype', ['float32', 'float16'], ids=['read as stored', 'converted'])
def test_images_that_stay_float_are_scaled_as_0_to_255(original_files, dtype):
    root = original_files(dtype='float32')
    data_rechunk.rechunk(root)
    path = root / 'train' / 'images.h5'
    change_h5(path, lambda images: with_row((0, 0, 0, 0), 99.5)(images.astype(dtype)))
    assert read_h5(path).dtype == dtype
    image = MTLDataset('train', root=root)[0][0]
    assert image.dtype == torch.float32
    assert image[0, 0, 0] == pytest.approx((99.5 / 255 - MEAN[0]) / STD[0])
    transformed = MTLDataset('train', RandomCropFlip(64, 64), root=root)[0][0]
    assert transformed.std() > 0.5  # not cut off at 1


def test_box_is_divided_by_width_and_height_of_non_square_images(original_files):
    root = original_files(size=(64, 96))
    data_rechunk.rechunk(root)
    bbox = MTLDataset('train', root=root)[2][1]
    np.testing.assert_allclose(bbox, read_h5(root / 'train' / 'bboxes.h5')[2] / (96, 64, 96, 64), rtol=1e-6)


@pytest.mark.parametrize('method', ['fork', pytest.param('spawn', marks=pytest.mark.slow)])
def test_workers_give_the_samples_of_a_single_process(shared_data, method):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f'no {method} on this system')
    dataset = MTLDataset('train', root=shared_data)
    alone = [dataset[i] for i in range(len(dataset))]  # opens the files before the fork
    loader = DataLoader(dataset, 5, num_workers=2, multiprocessing_context=method)
    together = [sample for batch in loader for sample in zip(*batch)]
    assert len(together) == len(alone)
    for one, two in zip(alone, together):
        assert all(torch.equal(a, b) for a, b in zip(one, two))


@pytest.mark.skipif('fork' not in multiprocessing.get_all_start_methods(), reason='no fork here')
def test_files_are_opened_once_in_a_process_and_by_each_forked_one(shared_data, monkeypatch):
    dataset, opened, original = MTLDataset('test', root=shared_data), [], h5py.File
    dataset[0]
    monkeypatch.setattr(h5py, 'File', lambda *args, **kw: opened.append(args) or original(*args, **kw))
    dataset[0], dataset[1]
    assert not opened
    context = multiprocessing.get_context('fork')
    queue = context.SimpleQueue()

    def read():
        torch.set_num_threads(1)  # as in a DataLoader's worker; OpenMP does not survive a fork
        dataset[0], dataset[1]
        queue.put(len(opened))

    process = context.Process(target=read, daemon=True)
    process.start()
    process.join(60)
    assert process.exitcode == 0 and queue.get() == 2


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
    """It may have any chunks, its structure need have no checksums, and nothing says which masks are known."""
    message = 'masks.h5: not as data_rechunk.py stores it; run python data_rechunk.py'
    path = data / 'train' / 'masks.h5'
    with h5py.File(path, 'r+') as file:
        masks = file['masks'][()]
        del file['known_masks']
    with pytest.raises(InputError, match=message):
        MTLDataset('train', root=data)
    with h5py.File(path, 'w', libver='earliest') as file:
        file.create_dataset('masks', data=masks, chunks=(1, 64, 64, 1))
        file['chunked_masks'], file['known_masks'] = file['masks'], np.ones(36, 'uint8')
    with pytest.raises(InputError, match=message):
        MTLDataset('train', root=data)


@pytest.mark.parametrize(
    'name, value',
    [('preparation', [1.5, 2]), ('preparation', h5py.Empty('f')), ('class_names', 7), ('class_names', h5py.Empty('f'))],
)
def test_attribute_of_wrong_type_raises_input_error(data, name, value):
    with h5py.File(data / 'train' / 'breeds.h5', 'r+') as file:
        file['breeds'].attrs[name] = value
    with pytest.raises(InputError, match='train'):
        MTLDataset('train', root=data)


# ---- augmentation


@pytest.fixture
def drawn(data):
    """Function that makes all images, masks and boxes of the training split those that it is given."""

    def draw(image, mask, box):
        for stem, values in ('images', image[..., None]), ('masks', mask[..., None]), ('bboxes', box):
            with h5py.File(data / 'train' / f'{stem}.h5', 'r+') as file:
                file[stem][...] = values
        return data

    return draw


@pytest.mark.parametrize('size', [(64, 64), (48, 80), (128, 32)])
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
    crops, flips = transform.draw(12, 60, 90)
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
        torch.testing.assert_close(
            found[1][row], bbox.as_subclass(torch.Tensor)[0], equal_nan=True, atol=1e-4, rtol=1e-5
        )
        assert found[2].dtype == torch.uint8 and torch.equal(found[2][row], mask)
    assert found[1][7].isnan().all() and not found[1][:7].isnan().any() and (found[2][5] == 255).all()


@pytest.mark.parametrize('image_size', [(64, 64), (100, 300), (300, 80)])
def test_crops_have_the_distribution_of_torchvisions(image_size):
    """Also where many a crop does not fit into the image and is drawn again."""
    torch.manual_seed(0)
    count, (height, width), ranges = 3000, image_size, {'scale': (0.2, 0.6), 'ratio': (0.5, 1.5)}
    found, flips = RandomCropFlip(64, 64, **ranges).draw(count, height, width)
    assert found.dtype == torch.int64 and abs(flips.double().mean() - 0.5) < 0.03
    assert (found >= 0).all() and (found[:, :2] + found[:, 2:] <= torch.tensor(image_size)).all()
    crop, image = v2.RandomResizedCrop(64, **ranges), torch.empty(1, height, width)
    drawn = [crop.make_params([image]) for _ in range(count)]
    expected = torch.tensor([[each[key] for key in ('top', 'left', 'height', 'width')] for each in drawn])
    quantiles = []
    for top, left, h, w in found.double().T, expected.double().T:
        values = torch.stack([top / height, left / width, h / height, w / width, h * w / (height * width), w / h])
        quantiles.append(torch.quantile(values, torch.tensor([0.01, 0.25, 0.5, 0.75, 0.99]).double(), dim=1))
    torch.testing.assert_close(*quantiles, atol=0.05, rtol=0)


class Crop(RandomCropFlip):
    """The crop of given pixels, not flipped."""

    def __init__(self, top, left, height, width):
        super().__init__(64, 64)
        self.crop = top, left, height, width

    def draw(self, count, height, width):
        return torch.tensor([self.crop] * count), torch.zeros(count, dtype=torch.bool)


@pytest.mark.parametrize(
    'left, expected',
    [
        (10, [10 / 40, 0.25, 1, 0.5]),  # the whole box, 20 to 50
        (3, [17 / 40, 0.25, 1, 0.5]),  # 23 of its 30 pixels, 0.77
        (2, None),  # 22, 0.73
        (24, [0, 0.25, 26 / 40, 0.5]),  # 26
        (28, None),
    ],
)
def test_box_of_which_a_crop_leaves_too_little_is_dropped_and_others_end_at_its_border(drawn, left, expected):
    root = drawn(np.zeros((64, 64)), np.zeros((64, 64)), (20, 16, 50, 32))
    crop = Crop(0, left, 64, 40 if left + 40 <= 64 else 64 - left)
    bbox = MTLDataset('train', crop, root=root)[0][1]
    if expected is None:
        assert bbox.isnan().all()
    else:
        expected = [x * 40 / crop.crop[3] if i % 2 == 0 else x for i, x in enumerate(expected)]
        assert bbox.tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize('transform', [lambda *parts: parts, Crop(0, 0, 64, 64)], ids=['none', 'whole'])
def test_small_box_is_kept(drawn, transform):
    root = drawn(np.zeros((64, 64)), np.zeros((64, 64)), (10, 10, 11, 40))
    bbox = MTLDataset('train', transform, root=root)[0][1]
    assert bbox.tolist() == pytest.approx([10 / 64, 10 / 64, 11 / 64, 40 / 64])


# ---- batches and pixels


def test_batched_reading_equals_reading_one_by_one(data):
    change_h5(data / 'train' / 'masks.h5', with_row(2, 255))
    change_h5(data / 'train' / 'bboxes.h5', with_row(4, np.nan))
    dataset, indices = MTLDataset('train', root=data), [5, 2, 30, 4, 0]
    batches = [
        dataset[indices],
        next(iter(DataLoader(dataset, batch_sampler=[indices]))),
        next(iter(DataLoader(dataset, batch_size=None, sampler=[indices]))),
        Subset(dataset, [0, 4, 30, 2, 5])[[4, 3, 2, 1, 0]],
    ]
    for batch in batches:
        for position, index in enumerate(indices):
            for one, two in zip(dataset[index], batch):
                assert torch.equal(one.nan_to_num(-1), two[position].nan_to_num(-1))


def test_an_index_counts_from_the_end_or_is_refused(shared_data):
    dataset = MTLDataset('test', root=shared_data)
    assert all(torch.equal(one, two) for one, two in zip(dataset[-1], dataset[len(dataset) - 1]))
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_colour_jitter_is_that_of_torchvision_for_each_image(shared_data):
    torch.manual_seed(0)
    images = torch.rand(4, 3, 8, 10) * 0.3 + 0.3  # far from the ends, where torchvision cuts off
    torch.manual_seed(1)
    found = colour_jitter(images, 0.2)
    torch.manual_seed(1)
    factors = torch.empty(3, 4).uniform_(0.8, 1.2)
    assert factors.std(dim=1).min() > 0.01
    for image, changed, (brightness, contrast, saturation) in zip(images, found, factors.T.tolist()):
        expected = v2.functional.adjust_brightness(image, brightness)
        expected = v2.functional.adjust_contrast(expected, contrast)
        torch.testing.assert_close(changed, v2.functional.adjust_saturation(expected, saturation), atol=1e-4, rtol=1e-4)
    plain, changed = (MTLDataset('test', root=shared_data, jitter=jitter)[0][0] for jitter in (0, 0.3))
    assert not torch.allclose(plain, changed, atol=0.01)


def red_squares():
    """Four grey images of 64 x 64 with a red pet of 32 x 32 and its box; of the last the mask is unknown."""
    images = torch.linspace(0.2, 0.8, 4)[:, None, None, None].expand(4, 3, 64, 64).clone()
    masks = torch.zeros(4, 1, 64, 64, dtype=torch.uint8)
    images[:, :, 16:48, 8:40], masks[:, :, 16:48, 8:40] = torch.tensor([1.0, 0, 0])[:, None, None], 1
    masks[3] = 255
    return images, torch.tensor([[8 / 64, 16 / 64, 40 / 64, 48 / 64]]).repeat(4, 1), masks


def test_zoom_out_moves_a_smaller_pet_with_mask_and_box_to_the_background_of_the_next_image():
    images, boxes, masks = red_squares()
    seed_everything(0)
    new_images, new_boxes, new_masks = zoom_out(images, boxes, masks, share=1, scale=(0.5, 0.5))
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
    for new, old in zip((new_images, new_boxes, new_masks), (images, boxes, masks)):
        assert torch.equal(new[2:], old[2:])  # its next image's mask is unknown, or its own


def test_zoom_out_remove_pets_and_poor_light_change_a_share_of_the_images():
    images, boxes, masks = (each[:1].repeat(400, *(each.ndim - 1) * [1]) for each in red_squares())
    seed_everything(0)
    changed = (zoom_out(images, boxes, masks, share=0.25)[2] != masks).flatten(1).any(dim=1)
    assert 70 < changed.sum() < 130
    labels = torch.zeros(400, dtype=torch.int64)
    assert 70 < (remove_pets(images, boxes, labels, masks, share=0.25)[2] < 0).sum() < 130
    found = poor_light(images, share=0.25)
    changed = (found != images).flatten(1).any(dim=1)
    assert 70 < changed.sum() < 130 and (found[changed].mean(dim=(1, 2, 3)) <= images.mean() + 0.01).all()
    assert (found[changed].mean(dim=(1, 2, 3)) < images.mean() / 2).sum() > 10


def test_remove_pets_leaves_background_without_labels():
    images, boxes, masks = red_squares()
    masks[2] = 0
    masks[2, :, :40] = 1  # more than half of the image
    seed_everything(0)
    found = remove_pets(images, boxes, torch.arange(4), masks, share=1)
    for new, old in zip(found, (images, boxes, torch.arange(4), masks)):
        assert torch.equal(new[2:], old[2:])  # too large, and unknown
    new_images, new_boxes, new_labels, new_masks = found
    torch.testing.assert_close(new_images[:2], images[:2, :, :1, :1].expand(2, 3, 64, 64))
    assert new_boxes[:2].isnan().all() and new_labels[:2].tolist() == [-1, -1] and not new_masks[:2].any()


def test_remove_pets_leaves_a_mask_with_an_unknown_pixel():
    images, boxes, masks = (each[:1] for each in red_squares())
    masks[0, 0, 0, 0] = 255
    found = remove_pets(images, boxes, torch.zeros(1, dtype=torch.int64), masks, share=1)
    assert torch.equal(found[0], images) and torch.equal(found[3], masks)


def test_what_fill_in_fills_in_comes_from_around():
    images = torch.linspace(0, 1, 48).expand(1, 3, 48, 48).clone()
    keep = torch.ones(1, 1, 48, 48)
    keep[:, :, 10:30, 20:30] = 0
    damaged = torch.where(keep > 0, images, 99.0)
    found = fill_in(damaged, keep)
    assert torch.equal(torch.where(keep > 0, found, images), images) and (found - images).abs().max() < 0.15
    assert fill_in(images, torch.zeros_like(keep)).isfinite().all()


def test_a_dataset_zooms_out_removes_pets_and_darkens(shared_data):
    plain = MTLDataset('train', root=shared_data)[[0, 1]]
    small = MTLDataset('train', root=shared_data, zoom_out=1)[[0, 1]]
    dark = MTLDataset('train', root=shared_data, poor_light=1)[[0, 1]]
    empty = MTLDataset('train', root=shared_data, remove_pets=1)[[0, 1]]
    assert small.mask.sum() < plain.mask.sum() and torch.equal(dark.mask, plain.mask)
    assert not empty.mask.any() and empty.bbox.isnan().all() and empty.label.tolist() == [-1, -1]
    assert dark.image.mean() < plain.image.mean()


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('dtype', [torch.uint8, torch.float32])
def test_normalise_is_that_of_torchvision_in_both_layouts(layout, dtype):
    images = torch.randint(0, 256, (2, 3, 6, 10), dtype=torch.uint8)
    images = v2.functional.to_dtype(images, dtype, scale=True).contiguous(memory_format=layout)
    before = images.clone()
    expected = v2.functional.normalize(v2.functional.to_dtype(images, torch.float32, scale=True), MEAN, STD)
    torch.testing.assert_close(normalise(images), expected, atol=2e-6, rtol=1e-5)
    assert normalise(images).is_contiguous(memory_format=layout) and torch.equal(images, before)
    torch.testing.assert_close(normalise(images[0]), expected[0], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize('name', ['', 'a\x1b[2J', 'a' * 101, b'caf\xe9'])
def test_breeds_whose_names_cannot_be_printed_are_refused(data, name):
    with h5py.File(data / 'train' / 'breeds.h5', 'r+') as file:
        count = len(file['breeds'].attrs['class_names'])
        file['breeds'].attrs.create('class_names', [name] * count, dtype=h5py.string_dtype())
    with pytest.raises(InputError, match="breeds.h5: no attribute 'class_names' with the breeds' names, each of 1 to"):
        MTLDataset('train', root=data)


def test_a_missing_split_is_named(shared_data):
    with pytest.raises(InputError, match='validation/images.h5: no such file'):
        MTLDataset('validation', root=shared_data)


@pytest.mark.parametrize(
    'stem, change, message',
    [
        ('bboxes', lambda boxes: boxes[:-1], 'lengths differ: images 36, masks 36, bboxes 35'),
        ('masks', lambda masks: masks[:, :32], 'sizes differ: images (64, 64), masks (32, 64)'),
        ('bboxes', lambda boxes: boxes / 64, 'bboxes.h5: no coordinate is above 1; boxes are expected in pixels'),
        ('binary', with_row(4, 2), 'binary.h5: sample 4 has label 2; expected a whole number from 0 to 1'),
        ('breeds', with_row(7, 8), 'breeds.h5: sample 7 has label 8; expected a whole number from 0 to 7'),
        ('bboxes', with_row(4, [40, 5, 30, 60]), 'bboxes.h5: sample 4 has the box'),
        ('bboxes', with_row(4, [0, 0, np.inf, 60]), 'bboxes.h5: sample 4 has the box'),
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


def test_the_species_of_a_class_without_test_images_is_known_from_training(data):
    change_h5(data / 'test' / 'breeds.h5', lambda labels: np.where(labels == 7, 2, labels))
    assert MTLDataset('test', root=data).split.class_species[7] is None
    assert load_splits(data, ['class'])['test'].dataset.split.class_species[7] == 'dog'


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


@pytest.mark.parametrize('size', [1, 2, 3])
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
