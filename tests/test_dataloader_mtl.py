"""MTLDataset: what a sample is, in every process, and what is refused at the door."""

import math
import multiprocessing
import pickle

import h5py
import numpy as np
import pytest
import torch
from conftest import same_bits
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
    load_splits,
    normalise,
    split_batches,
    training_size,
)
from support import synthetic_pets
from support.cli import InputError
from support.hdf5 import SPLITS, read_text

pytestmark = pytest.mark.usefixtures('rechunk_in_this_process')


def table(root, split, stem):
    with h5py.File(root / split / f'{stem}.h5') as file:
        return file[stem][()]


def change(root, stem, values, split='train', **attributes):
    """Replace a file by one with other values, rechunked."""
    path = root / split / f'{stem}.h5'
    with h5py.File(path, 'w') as file:
        file[stem] = values
        file[stem].attrs.update(attributes)
    data_rechunk.rechunk_file(path)


def test_a_sample_is_image_box_label_and_mask(shared_data):
    dataset = MTLDataset('train', root=shared_data)
    image, bbox, label, mask = dataset[3]
    stored = {stem: table(shared_data, 'train', stem)[3] for stem in ('images', 'bboxes', 'breeds', 'masks')}
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


def test_unknown_mask_is_255_unknown_box_nan_and_unknown_label_minus_one(data):
    masks, boxes, breeds = (table(data, 'train', stem) for stem in ('masks', 'bboxes', 'breeds'))
    masks[0], boxes[0], breeds[0] = 255, np.nan, -1
    masks[1, :5] = 255
    names = MTLDataset('train', root=data).split.class_names
    for stem, values in ('masks', masks), ('bboxes', boxes):
        change(data, stem, values)
    change(data, 'breeds', breeds, class_names=names)
    for stem in 'images', 'binary':
        change(data, stem, table(data, 'train', stem))
    dataset = MTLDataset('train', root=data)
    _, bbox, label, mask = dataset[0]
    assert bbox.isnan().all() and label == -1 and (mask == 255).all()
    partly = dataset[1][3][0]
    assert (partly[:5] == 255).all() and (partly[5:] <= 1).all()
    assert [bool(dataset.split.known[task][0]) for task in ('mask', 'class', 'box')] == [False] * 3
    assert dataset.with_labels(['mask', 'box']) == list(range(1, 36))


def test_species_of_a_class_is_that_of_all_its_samples(data):
    split = MTLDataset('train', root=data).split
    assert split.class_species == [('cat', 'dog')[breed.species] for breed in synthetic_pets.BREEDS]
    assert MTLDataset('train', root=data, label='species').split.class_species == ['cat', 'dog']
    species, breeds = table(data, 'train', 'binary'), table(data, 'train', 'breeds')
    first, second = np.flatnonzero(breeds == 0), np.flatnonzero(breeds == 1)
    species[first[0]] = 1 - species[first[0]]
    breeds[second] = -1
    change(data, 'binary', species)
    change(data, 'breeds', breeds, class_names=split.class_names)
    for stem in 'images', 'masks', 'bboxes':
        change(data, stem, table(data, 'train', stem))
    changed = MTLDataset('train', root=data).split.class_species
    assert changed[:2] == [None, None] and changed[2:] == split.class_species[2:]


def test_the_label_is_the_breed_where_there_is_one_and_the_species_elsewhere(data, original_files):
    assert len(MTLDataset('train', root=data).split.class_names) == 8
    species = MTLDataset('train', root=data, label='species')
    assert species.split.class_names == ['cat', 'dog']
    assert [int(species[i][2]) for i in range(36)] == table(data, 'train', 'binary')[:, 0].tolist()
    root = original_files()
    data_rechunk.rechunk(root)
    assert MTLDataset('train', root=root).split.class_names == ['cat', 'dog']
    with pytest.raises(InputError, match='breeds.h5: no such file'):
        MTLDataset('train', root=root, label='breed')


@pytest.mark.parametrize('layout', [{}, {'chunks': True, 'compression': 'gzip'}])
def test_samples_are_equal_for_all_stored_dtypes(original_files, tmp_path, layout):
    samples = []
    for dtype in 'uint8', 'float32', 'float64':
        root = original_files(tmp_path / dtype, dtype=dtype, **layout)
        if dtype == 'uint8':  # whole pixels, as a uint8 file holds them
            whole = {split: table(root, split, 'bboxes') for split in SPLITS}
        for split in SPLITS:
            with h5py.File(root / split / 'bboxes.h5', 'a') as file:
                file['bboxes'][...] = whole[split]
        data_rechunk.rechunk(root)
        samples.append(MTLDataset('train', root=root)[5])
    for other in samples[1:]:
        for one, two in zip(samples[0], other):
            assert torch.equal(one, two)
    assert set(samples[0][3].unique().tolist()) == {0, 1}


@pytest.mark.parametrize('dtype', ['float32', 'float64', '>f4', 'float16'])
def test_images_that_stay_float_are_scaled_as_0_to_255(original_files, dtype):
    root = original_files(dtype='float32')
    images = table(root, 'train', 'images')
    images[0, 0, 0, 0] = 99.5
    change(root, 'images', images.astype(dtype))
    data_rechunk.rechunk(root)
    image = MTLDataset('train', root=root)[0][0]
    assert image.dtype == torch.float32
    assert image[0, 0, 0] == pytest.approx((99.5 / 255 - MEAN[0]) / STD[0])
    transformed = MTLDataset('train', RandomCropFlip(64, 64), root=root)[0][0]
    assert transformed.std() > 0.5  # not cut off at 1


def test_box_is_divided_by_width_and_height_of_non_square_images(original_files):
    root = original_files(size=(64, 96))
    data_rechunk.rechunk(root)
    bbox = MTLDataset('train', root=root)[2][1]
    np.testing.assert_allclose(bbox, table(root, 'train', 'bboxes')[2] / (96, 64, 96, 64), rtol=1e-6)


def test_files_are_opened_once_in_a_process(shared_data, monkeypatch):
    dataset, opened, original = MTLDataset('train', root=shared_data), [], h5py.File
    dataset[0]
    monkeypatch.setattr(h5py, 'File', lambda *args, **kw: opened.append(args) or original(*args, **kw))
    for index in range(20):
        dataset[index]
    assert not opened


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
def test_a_forked_process_opens_files_of_its_own(shared_data, monkeypatch):
    dataset, opened, original = MTLDataset('test', root=shared_data), [], h5py.File
    dataset[0]
    monkeypatch.setattr(h5py, 'File', lambda *args, **kw: opened.append(args) or original(*args, **kw))
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
    change(data, 'images', 255 - table(data, 'train', 'images'), preparation='of other photographs')
    with pytest.raises(InputError, match='images.h5: holds other data than when it was opened'):
        pickle.loads(pickle.dumps(dataset))[0]


def test_files_without_a_preparation_may_not_be_replaced_at_all_while_they_are_in_use(original_files):
    root = original_files()
    data_rechunk.rechunk(root)
    dataset = MTLDataset('train', root=root)
    data_rechunk.rechunk_file(root / 'train' / 'images.h5', force=True)
    with pytest.raises(InputError, match='holds other data than when it was opened'):
        pickle.loads(pickle.dumps(dataset))[0]


def test_file_not_written_by_data_rechunk_asks_to_run_it(data):
    """They may have any chunks, and their structure need have no checksums."""
    path = data / 'train' / 'images.h5'
    images = table(data, 'train', 'images')
    with h5py.File(path, 'w', libver='earliest') as file:
        file.create_dataset('images', data=images, chunks=(1, 64, 64, 3))
        file['chunked_images'] = file['images']
    with pytest.raises(InputError, match='images.h5: not as data_rechunk.py stores it; run python data_rechunk.py'):
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


def test_a_dataset_in_use_can_be_pickled(shared_data):
    dataset = MTLDataset('test', root=shared_data)
    first = dataset[0]
    again = pickle.loads(pickle.dumps(dataset))[0]
    assert all(torch.equal(a, b) for a, b in zip(first, again))


# ---- augmentation


class CropOfTorchvision:
    """A transform of v2 for each image, as a user of torchvision would write it."""

    crop = v2.Compose([v2.RandomHorizontalFlip(), v2.RandomResizedCrop((48, 64), (0.4, 1.0), (0.8, 1.25))])

    def __call__(self, images, boxes, masks):
        rows = []
        for image, box, mask in zip(images, boxes, masks):
            box = tv_tensors.BoundingBoxes(box[None], format='XYXY', canvas_size=image.shape[1:], clamping_mode=None)
            rows.append(self.crop(tv_tensors.Image(image), box, tv_tensors.Mask(mask)))
        images, boxes, masks = (torch.stack([part.as_subclass(torch.Tensor) for part in parts]) for parts in zip(*rows))
        return images, boxes[:, 0], masks


@pytest.fixture(params=[RandomCropFlip(48, 64), CropOfTorchvision()], ids=['RandomCropFlip', 'v2'])
def transform(request):
    torch.manual_seed(0)
    return request.param


@pytest.fixture
def drawn(data):
    """Function that makes all images, masks and boxes of the training split those that it is given."""

    def draw(image, mask, box):
        for stem, values in ('images', image[..., None]), ('masks', mask[..., None]), ('bboxes', box):
            with h5py.File(data / 'train' / f'{stem}.h5', 'r+') as file:
                file[stem][...] = values
        return data

    return draw


def test_mask_and_box_move_with_the_image(drawn):
    """A picture of a rectangle that is its own mask and box: they agree afterwards."""
    torch.manual_seed(0)
    mask = np.zeros((64, 64), 'uint8')
    mask[18:40, 20:50] = 1
    dataset = MTLDataset('train', RandomCropFlip(48, 64), root=drawn(20 + 200 * mask, mask, (20, 18, 50, 40)))
    images, boxes, _, masks = dataset[list(range(36))]
    assert images.shape == (36, 3, 48, 64) and masks.shape == (36, 1, 48, 64)
    known = 0
    for image, bbox, mask in zip(images, boxes, masks):
        bright = image[0] > (image[0].min() + image[0].max()) / 2
        assert (bright == (mask[0] == 1)).float().mean() > 0.99
        ys, xs = np.nonzero(mask[0].numpy())
        found = np.array([xs.min() / 64, ys.min() / 48, (xs.max() + 1) / 64, (ys.max() + 1) / 48])
        if not bbox.isnan().any():
            np.testing.assert_allclose(bbox, found, atol=0.02)
            known += 1
    assert known > 18 and boxes[~boxes.isnan().any(dim=1)].std(dim=0).min() > 0.03  # and they do move


def test_mask_lies_where_the_image_does_to_a_tenth_of_a_pixel(drawn):
    """A mask resized with the mode 'nearest' lies half a pixel beside the image, to the lower right."""
    torch.manual_seed(0)
    ys, xs = np.mgrid[:64, :64] + 0.5
    disc = ((ys - 32) ** 2 + (xs - 32) ** 2 < 13**2).astype('uint8')
    dataset = MTLDataset('train', RandomCropFlip(48, 64), root=drawn(200 * disc, disc, (19, 19, 45, 45)))
    batches = [dataset[list(range(36))] for _ in range(2)]
    images, masks = (torch.cat([getattr(batch, field) for batch in batches]) for field in ('image', 'mask'))
    grey = images.mean(dim=1)
    lowest, highest = (getattr(grey.flatten(1), extreme)(dim=1)[:, None, None] for extreme in ('amin', 'amax'))
    images = (grey - lowest) / (highest - lowest)  # 1 where the disc covers a pixel
    offset = centroid(masks[:, 0]) - centroid(images)
    assert offset.mean(dim=0).abs().max() < 0.1 and offset.abs().max() < 0.6


def centroid(weights):
    """(N, H, W) -> (N, 2): y and x in pixels."""
    weights = weights.double()
    y, x = (torch.arange(side) + 0.5 for side in weights.shape[1:])
    total = weights.sum(dim=(1, 2))
    return (
        torch.stack([(weights.sum(dim=2) * y).sum(dim=1), (weights.sum(dim=1) * x).sum(dim=1)], dim=1) / total[:, None]
    )


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


@pytest.mark.parametrize('image_size', [(64, 64), (256, 192), (100, 300), (300, 80)])
def test_crops_lie_in_the_image_and_have_areas_and_ratios_of_the_ranges(image_size):
    torch.manual_seed(0)
    count, (height, width) = 4000, image_size
    crops, flips = RandomCropFlip(64, 64, scale=(0.2, 0.6), ratio=(0.5, 1.5)).draw(count, height, width)
    assert crops.dtype == torch.int64 and crops.shape == (count, 4) and flips.shape == (count,)
    top, left, h, w = crops.T
    assert (crops >= 0).all() and (top + h <= height).all() and (left + w <= width).all()
    rounding = 1 / h.min() + 1 / w.min()  # relative, of a side to whole pixels
    area, ratio = h * w / (height * width), w / h
    assert area.min() > 0.2 * (1 - rounding) and area.max() < 0.6 * (1 + rounding)
    assert ratio.min() > 0.5 * (1 - rounding) and ratio.max() < 1.5 * (1 + rounding)
    # Where the crop lies, from 0 at one border to 1 at the other, and the flips.
    for position, room in (top, height - h), (left, width - w):
        places = (position[room > 9] / room[room > 9]).double()
        assert abs(places.mean() - 0.5) < 0.03 and places.min() < 0.02 and places.max() > 0.98
        assert abs(places.std() - 12**-0.5) < 0.03
    assert abs(flips.double().mean() - 0.5) < 0.03
    if image_size == (64, 64):  # any crop fits: uniform areas, log-uniform ratios
        assert abs(area.double().mean() - 0.4) < 0.01 and abs(area.double().std() - 0.4 / 12**0.5) < 0.01
        middle = (math.log(0.5) + math.log(1.5)) / 2
        assert abs(ratio.double().log().mean() - middle) < 0.03


def test_crops_have_the_distribution_of_torchvisions():
    """Also where many a crop does not fit into the image and is drawn again."""
    torch.manual_seed(0)
    found, _ = RandomCropFlip(64, 64, scale=(0.4, 1.0)).draw(2000, 64, 96)
    crop, image = v2.RandomResizedCrop(64, scale=(0.4, 1.0), ratio=(0.8, 1.25)), torch.empty(1, 64, 96)
    drawn = [crop.make_params([image]) for _ in range(2000)]
    expected = torch.tensor([[each[key] for key in ('top', 'left', 'height', 'width')] for each in drawn]).double()
    for moment in torch.mean, torch.std:
        torch.testing.assert_close(moment(found.double(), dim=0), moment(expected, dim=0), atol=0.8, rtol=0)


def test_equal_seeds_draw_equal_batches(shared_data):
    dataset = MTLDataset('train', RandomCropFlip(64, 64), root=shared_data)
    batches = []
    for seed in 1, 1, 2:
        torch.manual_seed(seed)
        batches.append(dataset[[0, 1, 2, 3]])
    first, again, other = batches
    assert same_bits([part.nan_to_num(-1) for part in first], [part.nan_to_num(-1) for part in again])
    assert not torch.equal(first.image, other.image)


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
        (0, None),
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


def test_unknown_masks_and_boxes_stay_unknown_in_any_transform(data, transform):
    masks, boxes = table(data, 'train', 'masks'), table(data, 'train', 'bboxes')
    masks[1], boxes[2], masks[3] = 255, np.nan, 255
    for stem, values in ('masks', masks), ('bboxes', boxes):
        with h5py.File(data / 'train' / f'{stem}.h5', 'r+') as file:
            file[stem][...] = values
    data_rechunk.rechunk_file(data / 'train' / 'masks.h5', force=True)
    _, boxes, _, masks = MTLDataset('train', transform, root=data)[[0, 1, 2, 3]]
    assert (masks == 255).flatten(1).all(dim=1).tolist() == [False, True, False, True]
    assert (masks[0] <= 1).all() and boxes[2].isnan().all()


# ---- batches and pixels


def test_batched_reading_equals_reading_one_by_one(data):
    masks, boxes = table(data, 'train', 'masks'), table(data, 'train', 'bboxes')
    masks[2], masks[5, :9], boxes[4] = 255, 255, np.nan
    for stem, values in (
        ('masks', masks),
        ('bboxes', boxes),
        ('images', table(data, 'train', 'images')),
        ('binary', table(data, 'train', 'binary')),
    ):
        change(data, stem, values)
    (data / 'train' / 'breeds.h5').unlink()
    dataset = MTLDataset('train', root=data)
    indices = [5, 2, 30, 4, 0]
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


def test_colour_jitter_is_that_of_torchvision_for_each_image():
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


def test_jitter_reaches_the_samples(shared_data):
    plain, changed = (MTLDataset('test', root=shared_data, jitter=jitter)[0][0] for jitter in (0, 0.3))
    assert not torch.allclose(plain, changed, atol=0.01)


@pytest.mark.parametrize('name', ['', 'a\x1b[2J', 'a' * 101, b'caf\xe9'])
def test_breeds_whose_names_cannot_be_printed_are_refused(data, name):
    with h5py.File(data / 'train' / 'breeds.h5', 'r+') as file:
        count = len(file['breeds'].attrs['class_names'])
        file['breeds'].attrs.create('class_names', [name] * count, dtype=h5py.string_dtype())
    with pytest.raises(InputError, match="breeds.h5: no attribute 'class_names' with the breeds' names, each of 1 to"):
        MTLDataset('train', root=data)
    assert MTLDataset('train', root=data, label='species').split.class_names == ['cat', 'dog']


def test_a_missing_split_is_named(shared_data):
    with pytest.raises(InputError, match='validation/images.h5: no such file'):
        MTLDataset('validation', root=shared_data)


def test_files_of_different_lengths_are_refused(data):
    change(data, 'bboxes', table(data, 'train', 'bboxes')[:-1])
    with pytest.raises(InputError, match='lengths differ: images 36, masks 36, bboxes 35'):
        MTLDataset('train', root=data)


def test_masks_of_another_size_are_refused(data):
    change(data, 'masks', table(data, 'train', 'masks')[:, :32])
    with pytest.raises(InputError, match=r'sizes differ: images \(64, 64\), masks \(32, 64\)'):
        MTLDataset('train', root=data)


def test_files_of_two_preparations_are_refused(data):
    change(data, 'bboxes', table(data, 'train', 'bboxes'), preparation='another')
    with pytest.raises(InputError, match='preparations differ'):
        MTLDataset('train', root=data)


def test_boxes_scaled_to_1_are_refused(original_files):
    root = original_files()
    change(root, 'bboxes', table(root, 'train', 'bboxes') / 64)
    data_rechunk.rechunk(root)
    with pytest.raises(InputError, match='bboxes.h5: no coordinate is above 1; boxes are expected in pixels'):
        MTLDataset('train', root=root)


@pytest.mark.parametrize(
    'stem, row, message',
    [
        ('binary', [2], 'binary.h5: sample 4 has label 2; expected a whole number from 0 to 1'),
        ('bboxes', [40, 5, 30, 60], 'bboxes.h5: sample 4 has the box'),
        ('bboxes', [0, 0, np.inf, 60], 'bboxes.h5: sample 4 has the box'),
        ('bboxes', [0, 0, 70, 60], 'expected xmin < xmax and ymin < ymax within an image of 64 x 64'),
    ],
)
def test_values_out_of_range_are_refused(original_files, stem, row, message):
    root = original_files(dtype='float32')
    values = table(root, 'train', stem)
    values[4] = row
    change(root, stem, values)
    data_rechunk.rechunk(root)
    with pytest.raises(InputError) as error:
        MTLDataset('train', root=root)
    assert message in str(error.value)


def test_a_breed_out_of_range_is_refused(data):
    breeds = table(data, 'train', 'breeds')
    breeds[7] = 8
    with h5py.File(data / 'train' / 'breeds.h5', 'a') as file:
        file['breeds'][...] = breeds
    with pytest.raises(InputError, match='sample 7 has label 8; expected a whole number from 0 to 7'):
        MTLDataset('train', root=data)


def test_opening_reads_no_mask(data):
    path = data / 'train' / 'masks.h5'
    with h5py.File(path, 'r+') as file:
        file['masks'][3:5] = 255
    data_rechunk.rechunk_file(path, force=True, checksums=True)
    with h5py.File(path) as file:
        dataset = file['masks'].id
        offsets = [dataset.get_chunk_info(number).byte_offset for number in range(dataset.get_num_chunks())]
    with open(path, 'r+b') as file:
        for offset in offsets:
            file.seek(offset)
            file.write(b'damaged')
    dataset = MTLDataset('train', root=data)
    assert np.flatnonzero(~dataset.split.known['mask']).tolist() == [3, 4]
    with pytest.raises(InputError, match='masks.h5: sample 0 is damaged'):
        dataset[0]


def test_files_rechunked_before_known_masks_were_recorded_ask_to_run_data_rechunk(data):
    path = data / 'train' / 'masks.h5'
    with h5py.File(path, 'r+') as file:
        del file['known_masks']
    with pytest.raises(InputError, match='masks.h5: not as data_rechunk.py stores it; run python data_rechunk.py'):
        MTLDataset('train', root=data)
    data_rechunk.rechunk(data)
    assert MTLDataset('train', root=data).split.known['mask'].all()


def test_images_without_a_label_for_the_network_are_not_used_and_masks_can_be_left_out(shared_data):
    splits = load_splits(shared_data, ['mask'], masks=6)
    kept = splits['train'].indices
    assert (
        len(kept) == 6
        and len(splits['val']) == 12
        and kept == load_splits(shared_data, ['mask'], masks=6)['train'].indices
    )
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


@pytest.mark.parametrize('text', ['a', ['a', 'b'], 'caf\xe9'])
def test_text_of_fixed_and_of_variable_length_is_read(tmp_path, text):
    """Files written before have variable-length text; it is copied as fixed-length bytes."""
    path = tmp_path / 'binary.h5'
    with h5py.File(path, 'w') as file:
        file['binary'] = np.zeros((3, 1), 'uint8')
        file['binary'].attrs.create('text', text, dtype=h5py.string_dtype())
        assert read_text(file['binary'].attrs, 'text') == text
        assert read_text(file['binary'].attrs, 'nothing') is None
    data_rechunk.rechunk_file(path)
    with h5py.File(path) as file:
        assert file['binary'].attrs.get_id('text').dtype.kind == 'S'
        assert read_text(file['binary'].attrs, 'text') == text
