"""MTLDataset: what a sample is, in every process, and what is refused at the door."""

import multiprocessing
import pickle

import h5py
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Subset
from torchvision import tv_tensors
from torchvision.transforms import v2

import data_rechunk
from dataloader_mtl import (
    MEAN,
    STD,
    MTLDataset,
    colour_jitter,
    epoch_positions,
    normalise,
    split_batches,
    training_size,
    training_transform,
)
from support.cli import InputError
from support.hdf5 import SPLITS, create_h5, read_text


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
    assert [t.dtype for t in (image, bbox, mask)] == [torch.float32] * 3
    assert [type(t) for t in (image, bbox, label, mask)] == [torch.Tensor] * 4
    assert len(dataset) == 36 and dataset.image_size == (64, 64)


def test_missing_box_and_mask_are_nan_and_missing_label_is_minus_one(data):
    masks, boxes, breeds = (table(data, 'train', stem) for stem in ('masks', 'bboxes', 'breeds'))
    masks[0], boxes[0], breeds[0] = 255, np.nan, -1
    masks[1, :5] = 255
    names = MTLDataset('train', root=data).class_names
    for stem, values in ('masks', masks), ('bboxes', boxes):
        change(data, stem, values)
    change(data, 'breeds', breeds, class_names=names)
    for stem in 'images', 'binary':
        change(data, stem, table(data, 'train', stem))
    dataset = MTLDataset('train', root=data)
    _, bbox, label, mask = dataset[0]
    assert bbox.isnan().all() and label == -1 and mask.isnan().all()
    partly = dataset[1][3][0]
    assert partly[:5].isnan().all() and not partly[5:].isnan().any()
    assert [bool(dataset.labelled[task][0]) for task in ('mask', 'class', 'box')] == [False] * 3
    assert dataset.with_labels(['mask', 'box']) == list(range(1, 36))


def test_the_label_is_the_breed_where_there_is_one_and_the_species_elsewhere(data, original_files):
    assert len(MTLDataset('train', root=data).class_names) == 8
    species = MTLDataset('train', root=data, label='species')
    assert species.class_names == ['cat', 'dog']
    assert [int(species[i][2]) for i in range(36)] == table(data, 'train', 'binary')[:, 0].tolist()
    root = original_files()
    data_rechunk.rechunk(root)
    assert MTLDataset('train', root=root).class_names == ['cat', 'dog']
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
    transformed = MTLDataset('train', training_transform(64, 64), root=root)[0][0]
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


@pytest.mark.parametrize('method', ['fork', 'spawn'])
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


def test_mask_and_box_move_with_the_image(shared_data):
    def joint(image, boxes, mask):
        # A picture of a rectangle that is its own mask and box: they must agree afterwards.
        image[:], mask[:] = 20, 0
        image[:, 12:40, 20:50], mask[:, 12:40, 20:50] = 220, 1
        boxes = tv_tensors.wrap(torch.tensor([[20.0, 12.0, 50.0, 40.0]]), like=boxes)
        return training_transform(64, 64)(image, boxes, mask)

    dataset = MTLDataset('train', joint, root=shared_data)
    torch.manual_seed(0)
    boxes = []
    for index in range(30):
        image, bbox, _, mask = dataset[index]
        assert mask.shape == (1, 64, 64) and image.shape == (3, 64, 64)
        bright = image[0] > (image[0].min() + image[0].max()) / 2
        assert (bright == (mask[0] == 1)).float().mean() > 0.95
        ys, xs = np.nonzero(mask[0].numpy())
        found = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]) / 64
        np.testing.assert_allclose(bbox, found, atol=0.03)
        boxes.append(bbox)
    assert torch.stack(boxes).std(dim=0).min() > 0.03  # and they do move


def test_a_box_that_leaves_the_picture_becomes_unknown(shared_data):
    def shift(image, boxes, mask):
        return image, tv_tensors.wrap(boxes + 64, like=boxes), mask

    bbox = MTLDataset('train', shift, root=shared_data)[0][1]
    assert bbox.shape == (4,) and bbox.isnan().all()


def test_a_small_box_is_dropped_by_augmentation_alone(data):
    boxes = table(data, 'train', 'bboxes')
    boxes[0] = 10, 10, 11, 40
    with h5py.File(data / 'train' / 'bboxes.h5', 'a') as file:
        file['bboxes'][...] = boxes
    assert not MTLDataset('train', root=data)[0][1].isnan().any()
    assert MTLDataset('train', lambda *parts: parts, root=data)[0][1].isnan().all()


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


def test_colour_jitter_is_that_of_torchvision_for_each_image_alone():
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


def test_augmentation_is_seeded(shared_data):
    dataset = MTLDataset('train', training_transform(64, 64), root=shared_data)
    samples = []
    for seed in 1, 1, 2:
        torch.manual_seed(seed)
        samples.append(dataset[0][0])
    assert torch.equal(samples[0], samples[1]) and not torch.equal(samples[0], samples[2])


@pytest.mark.parametrize('name', ['', 'a\x1b[2J', 'a' * 101, b'caf\xe9'])
def test_breeds_whose_names_cannot_be_printed_are_refused(data, name):
    with h5py.File(data / 'train' / 'breeds.h5', 'r+') as file:
        count = len(file['breeds'].attrs['class_names'])
        file['breeds'].attrs.create('class_names', [name] * count, dtype=h5py.string_dtype())
    with pytest.raises(InputError, match="breeds.h5: no attribute 'class_names' with the breeds' names, each of 1 to"):
        MTLDataset('train', root=data)
    assert MTLDataset('train', root=data, label='species').class_names == ['cat', 'dog']


def test_missing_chunked_dataset_asks_to_run_data_rechunk(original_files):
    root = original_files()
    with pytest.raises(InputError, match="no 'chunked_images'; run python data_rechunk.py --data"):
        MTLDataset('train', root=root)


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


def test_image_type_that_rechunking_never_leaves_is_refused(data):
    path = data / 'train' / 'images.h5'
    values = table(data, 'train', 'images').astype('int16')
    with create_h5(path) as file:
        file['chunked_images'] = file.create_dataset('images', data=values, chunks=(1, *values.shape[1:]))
    with pytest.raises(InputError, match='images.h5: int16; data_rechunk.py --force stores it as uint8'):
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


def test_a_mask_with_other_values_is_refused(data):
    with h5py.File(data / 'train' / 'masks.h5', 'a') as file:
        file['masks'][2, 5, 5] = 7
    with pytest.raises(InputError, match='masks.h5: sample 2 holds 7'):
        MTLDataset('train', root=data)


def test_masks_of_0_and_255_are_refused(data):
    with h5py.File(data / 'train' / 'masks.h5', 'a') as file:
        file['masks'][...] = file['masks'][()] * 255
    with pytest.raises(InputError, match='holds 0 and 255 but no 1'):
        MTLDataset('train', root=data)


def test_images_scaled_to_one_are_refused(original_files):
    root = original_files(dtype='float32')
    change(root, 'images', table(root, 'train', 'images') / 255)
    data_rechunk.rechunk(root)
    with pytest.raises(InputError, match='expected as 0 to 255'):
        MTLDataset('train', root=root)


def test_images_without_a_label_for_the_network_are_not_used(data, tmp_path):
    dataset = MTLDataset('train', root=data)
    dataset.labelled['mask'][:30] = False
    assert len(dataset.with_labels(['mask'])) == 6
    assert len(dataset.with_labels(['mask', 'class', 'box'])) == 36


def test_size_grows_to_the_images_own():
    sizes = [training_size(epoch, 20, (256, 192)) for epoch in range(1, 21)]
    assert sizes == [(128, 96)] * 13 + [(192, 144)] * 6 + [(256, 192)]
    assert training_size(1, 10, (64, 80)) == (64, 64)
    assert training_size(1, 1, (256, 256)) == (128, 128)


@pytest.mark.parametrize('masks, times', [(36, 1), (12, 1), (11, 3), (1, 3), (0, 1)])
def test_masked_images_are_oversampled_if_masks_are_rare(shared_data, masks, times):
    dataset = MTLDataset('train', root=shared_data)
    dataset.labelled['mask'][masks:] = False
    part = Subset(dataset, range(35, -1, -1))
    positions = epoch_positions(part)
    counts = torch.bincount(torch.tensor(part.indices)[positions], minlength=36)
    assert counts.tolist() == [times] * masks + [1] * (36 - masks)


@pytest.mark.parametrize('size', [1, 2, 3])
@pytest.mark.parametrize('count, batch_size', [(36, 16), (37, 5), (16, 16), (7, 4)])
def test_ranks_share_each_batch_and_give_each_sample_once(monkeypatch, size, count, batch_size):
    order, shares = torch.randperm(count), []
    for rank in range(size):
        monkeypatch.setenv('RANK', str(rank))
        monkeypatch.setenv('WORLD_SIZE', str(size))
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
