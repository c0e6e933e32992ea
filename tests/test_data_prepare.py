"""Photographs to HDF5 splits."""

import os
import shutil

import h5py
import numpy as np
import pytest
from conftest import assert_full_disk_leaves_files, read_h5, write_xml
from PIL import Image

import data_rechunk
from data_prepare import STEMS, in_strata_order, main, make_folds, match_thumbnails, split_groups, split_officially
from support.hdf5 import SPLITS, read_text
from support.sources import OxfordPets, Record
from support.splits import limited, read_split


@pytest.fixture
def pets(oxford):
    """`oxford`, but it returns the folder of images and annotations, which is a root, too."""
    return lambda *args, **options: oxford(*args, **options) / 'oxford-iiit-pet'


def prepare(root, out, *options, split='60-20-20'):
    main(['--root', str(root), '--out', str(out), '--size', '64', '--split', split, *options])


def read(root, split, stem):
    return read_h5(root / split / f'{stem}.h5')


def names(root, split):
    return [name.decode() for name in read(root, split, 'names')]


def h5_files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob('*.h5')}


def read_first(folder, border='pet'):
    """An OxfordPets, and image, mask and box of its first record at 64 x 64."""
    source = OxfordPets(folder, border)
    return source, *source.read(source.records[0], 64)


# ---- which split


def records(count):
    return [Record(f'pet_{i}', i % 2, i % 5, has_mask=i % 6 == 0, has_box=i % 2 == 0) for i in range(count)]


def deal(groups, shares=(80, 10, 10)):
    return split_groups(groups, dict(zip(SPLITS, shares)))


def test_each_split_has_its_share_of_every_label_and_breed_and_groups_stay_whole():
    ordered = in_strata_order(records(600), seed=1)
    single = [[record] for record in ordered]
    paired = [ordered[i : i + 1 + (i % 12 == 0)] for i in range(600) if i % 12 != 1]  # a pair, ten singles, and again
    for groups in single, paired:
        splits = deal(groups)
        assert all(any(set(group) <= set(found) for found in splits.values()) for group in groups)
        assert sorted(record for found in splits.values() for record in found) == sorted(ordered)
        for split, count in zip(SPLITS, (480, 60, 60)):
            found = splits[split]
            assert len(found) == pytest.approx(count, abs=2)
            assert sum(r.has_mask for r in found) == pytest.approx(count / 6, abs=3)
            assert sum(r.has_box for r in found) == pytest.approx(count / 2, abs=4)
            for breed in range(5):
                assert sum(r.breed == breed for r in found) == pytest.approx(count / 5, abs=4)


def test_the_split_depends_on_the_seed_and_not_on_the_order_of_files():
    shuffled = [records(100)[i] for i in np.random.default_rng(0).permutation(100)]
    first, again, other = (in_strata_order(r, seed) for r, seed in ((records(100), 0), (shuffled, 0), (shuffled, 1)))
    assert first == again
    assert first != other


def test_each_image_is_tested_in_one_fold_and_groups_stay_together():
    ordered = in_strata_order(records(600), 0)
    group = ordered[:3]
    folds = make_folds([group, *([record] for record in ordered[3:])], 5)
    assert sorted(record for fold in folds for record in fold['test']) == sorted(ordered)
    for fold in folds:
        assert sorted(sum(fold.values(), [])) == sorted(ordered)
        assert [len(fold[split]) for split in SPLITS] == pytest.approx([420, 60, 120], abs=3)
        assert any(set(group) <= set(part) for part in fold.values())
        assert sum(record.has_mask for record in fold['test']) == pytest.approx(20, abs=3)


def test_folds_are_written_and_rechunked_as_splits(pets, tmp_path, capsys):
    folder, out = pets(30, masks=range(0, 30, 2), breeds=3), tmp_path / 'folds'
    for name in 'breed0_0', 'breed2_2':
        Image.new('L', (80, 60), 7).save(folder / f'annotations/trimaps/{name}.png')
    main(['--root', str(folder), '--out', str(out), '--size', '64', '--folds', '3'])
    output = capsys.readouterr()
    assert 'unreadable annotations left out: 2 ' in output.out and output.err.count('breed0_0.png') == 1
    data_rechunk.main(['--data', str(out)])
    tested = [name for number in range(3) for name in names(out / f'fold{number}', 'test')]
    assert sorted(tested) == sorted(f'breed{i % 3}_{i}' for i in range(30))
    assert len({read_split(out / f'fold{number}' / 'train').preparation for number in range(3)}) == 3


def test_a_limit_takes_a_stratified_part():
    part = limited(in_strata_order(records(600), seed=0), 60)
    assert len(part) == 60 == len(set(part))
    assert sum(r.has_mask for r in part) == pytest.approx(10, abs=1)


# ---- near-identical images


def add_copies(folder):
    """Let images 3, 10 and 17 be versions of image 0, and image 12 a copy of image 5."""

    def path(number):
        return folder / f'images/breed{number % 2}_{number}.jpg'

    for number, pixels in zip((0, 5), np.random.default_rng(1).integers(0, 256, (2, 6, 8, 3), dtype=np.uint8)):
        Image.fromarray(pixels).resize((80, 60), Image.Resampling.BICUBIC).save(path(number), quality=90)
    with Image.open(path(0)) as image:
        image.save(path(3), quality=40)
        image.point(lambda value: 40 + value * 0.7).save(path(10))
        image.resize((120, 90)).convert('L').save(path(17))
    shutil.copy(path(5), path(12))


def test_copies_are_in_one_split(pets, tmp_path, capsys):
    folder = pets(20)
    add_copies(folder)
    prepare(folder, tmp_path, split='40-30-30')
    assert 'near-identical images: 6 in 2 groups, each kept in one split\n' in capsys.readouterr().out
    splits = [set(names(tmp_path, split)) for split in SPLITS]
    for copies in {'breed0_0', 'breed1_3', 'breed0_10', 'breed1_17'}, {'breed1_5', 'breed0_12'}:
        assert any(copies <= split for split in splits)


def test_thumbnails_match_by_correlation_and_by_way_of_others():
    one, other = np.random.default_rng(0).normal(size=(2, 16, 16))
    one[0, 0], other[0, 0] = 2, 0  # in the order of pixels the chain's two ends come first and meet last
    chain = [np.cos(angle) * one + np.sin(angle) * other for angle in np.linspace(-1, 1, 21)]
    chain = np.rint(128 + 25 * np.stack(chain)).astype(np.uint8)
    near = np.corrcoef(chain.reshape(21, -1)) > 0.99
    assert (near == (abs(np.subtract.outer(range(21), range(21))) <= 1)).all()
    flat = np.full((16, 16), 90, np.uint8)
    with np.errstate(all='raise'):
        numbers = match_thumbnails(np.stack([*chain, 255 - chain[10], flat, flat + 9, flat]))
    assert len(set(numbers[:21])) == 1 and numbers[22] == numbers[24]
    assert len(set(numbers)) == 4


def test_thumbnails_of_many_images_match_across_blocks():
    first = np.random.default_rng(0).integers(0, 100, (2100, 8, 8), dtype=np.uint8)
    numbers = match_thumbnails(np.concatenate([first, first + 120]))
    assert (numbers[:2100] == numbers[2100:]).all() and len(set(numbers)) == 2100


# ---- the official split


def write_parts(folder, test):
    """Write trainval.txt and test.txt, which has the images of these numbers."""
    lines = (folder / 'annotations/list.txt').read_text().splitlines()[1:]
    for name, members in ('trainval', set(range(len(lines))) - set(test)), ('test', set(test)):
        (folder / f'annotations/{name}.txt').write_text('\n'.join(lines[i] for i in sorted(members)))


def test_the_official_split_is_taken_as_it_is(pets, tmp_path, capsys):
    folder, test = pets(41, masks=range(0, 40, 4)), range(10, 20)
    write_parts(folder, test)
    path = folder / 'annotations/trainval.txt'
    path.write_text(path.read_text().rpartition('\n')[0])  # image 40 is in neither file
    add_copies(folder)  # 0 and 3 for training, 10 and 17 for the test; 5 and 12
    prepare(folder, tmp_path, split='official')
    assert '6 in 2 groups, 2 of them across trainval.txt and test.txt (not moved)\n' in capsys.readouterr().out
    assert names(tmp_path, 'test') == sorted(f'breed{i % 2}_{i}' for i in test)
    train, val = (names(tmp_path, split) for split in ('train', 'val'))
    assert sorted(train + val) == sorted(f'breed{i % 2}_{i}' for i in range(40) if i not in test)
    assert len(val) == pytest.approx(6, abs=2)


def test_a_group_of_the_official_split_stays_together_in_train_or_val():
    ordered = records(100)
    splits = split_officially([ordered[:9], *([record] for record in ordered[9:])], test={ordered[0], ordered[50]})
    assert [len(set(ordered[1:9]) & set(splits[split])) for split in ('train', 'val')] in ([8, 0], [0, 8])
    assert splits['test'] == [ordered[0], ordered[50]]


@pytest.mark.parametrize(
    'file, text, message',
    [
        ('trainval', None, 'trainval.txt: no such file; take list.txt, trainval.txt and test.txt from one release'),
        ('test', '', 'test.txt: lists no image; '),
        ('test', 'breed0_0 1 1 1', "'breed0_0' is in both trainval.txt and test.txt; "),
        ('test', 'breed0_8 2 1 1', "'breed0_8' is not in list.txt, or of another class there; "),
    ],
)
def test_official_files_that_do_not_fit_are_named(pets, tmp_path, error_line, file, text, message):
    folder = pets(10)
    write_parts(folder, (8, 9))
    path = folder / f'annotations/{file}.txt'
    path.unlink() if text is None else path.write_text(text)
    line = error_line(main, '--root', folder, '--out', tmp_path / 'out', '--split', 'official')
    assert message in line and not (tmp_path / 'out').exists()


# ---- what is stored


def test_a_photograph_is_kept_with_the_labels_it_has(pets, tmp_path, capsys):
    prepare(pets(40, masks=range(0, 40, 4), boxes=range(0, 40, 2)), tmp_path, split='50-25-25')
    table = [line.split() for line in capsys.readouterr().out.splitlines()[:4]]
    assert table[0] == ['split', 'images', 'masks', 'boxes', 'cats', 'dogs', 'classes']
    assert [row[0] for row in table[1:]] == list(SPLITS)
    assert [sum(int(row[column]) for row in table[1:]) for column in range(1, 6)] == [40, 10, 20, 20, 20]
    for split in SPLITS:
        numbers = np.array([int(name.rpartition('_')[2]) for name in names(tmp_path, split)])
        unknown = (read(tmp_path, split, 'masks') == 255).all(axis=(1, 2, 3))
        assert unknown.tolist() == (numbers % 4 != 0).tolist()
        assert np.isnan(read(tmp_path, split, 'bboxes')).all(axis=1).tolist() == (numbers % 2 != 0).tolist()
        for stem in 'breeds', 'binary':
            assert read(tmp_path, split, stem)[:, 0].tolist() == (numbers % 2).tolist()
    stored = {stem: read(tmp_path, 'train', stem) for stem in STEMS}
    assert {stem: (values.dtype, values.shape) for stem, values in stored.items()} == {
        'images': ('u1', (20, 64, 64, 3)),
        'masks': ('u1', (20, 64, 64, 1)),
        'bboxes': ('f4', (20, 4)),
        'binary': ('i1', (20, 1)),
        'breeds': ('i2', (20, 1)),
        'names': ('S9', (20,)),
    }


@pytest.mark.parametrize('border, value', [('pet', 1), ('background', 0), ('ignore', 255)])
def test_the_border_counts_as_asked(pets, border, value):
    _, _, mask, _ = read_first(pets(1, size=(64, 64), masks=[0]), border)
    assert mask[0, :, 0].tolist() == [1] * 28 + [value] * 8 + [0] * 28


def test_a_mask_without_a_pet_is_unknown_and_named(pets, tmp_path, capsys):
    folder, petless = pets(10, masks=range(10)), ['breed1_3', 'breed1_5']
    for name, value in zip(petless, (2, 3)):  # background only, border only
        Image.new('L', (80, 60), value).save(folder / f'annotations/trimaps/{name}.png')
    prepare(folder, tmp_path, '--border', 'background')
    output = capsys.readouterr()
    assert '\nmasks without a pet, stored as unknown: 2 (breed1_3, breed1_5)\n' in output.out
    assert 'unreadable' not in output.out and 'warning' not in output.err
    for split in SPLITS:
        unknown = (read(tmp_path, split, 'masks') == 255).all(axis=(1, 2, 3))
        assert unknown.tolist() == [name in petless for name in names(tmp_path, split)]


def test_boxes_are_scaled_by_the_size_in_the_xml(pets):
    folder = pets(1, size=(80, 60), boxes=[0])
    write_xml(folder / 'annotations/xmls/breed0_0.xml', (160, 120), (16, 12, 80, 60))  # twice the size on disk
    np.testing.assert_allclose(read_first(folder)[3], [6.4, 6.4, 32, 32], rtol=1e-6)


def test_exif_rotation_is_not_applied(pets):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees
    folder = pets(1, size=(64, 64), exif=exif)
    with Image.open(folder / 'images/breed0_0.jpg') as image:
        assert image.getexif() and np.array_equal(read_first(folder)[1], image)


def test_the_same_content_gives_the_same_bytes_also_from_the_folder_above_and_with_a_byte_order_mark(oxford, tmp_path):
    root = oxford(20, masks=range(5), boxes=range(9))
    prepare(root, tmp_path / 'a')
    folder = root / 'oxford-iiit-pet'
    path = folder / 'annotations/list.txt'
    path.write_text(path.read_text().partition('\n')[2], 'utf-8-sig')  # without the comment in the first line
    prepare(folder, tmp_path / 'b')
    assert h5_files(tmp_path / 'a') == h5_files(tmp_path / 'b')


def test_other_content_makes_another_preparation(pets, tmp_path):
    folder, found = pets(10, masks=[0], boxes=[0]), set()
    labels = folder / 'annotations/list.txt'
    changes = [
        lambda: None,
        lambda: Image.new('RGB', (80, 60), 'red').save(folder / 'images/breed0_0.jpg'),
        lambda: Image.new('L', (80, 60), 1).save(folder / 'annotations/trimaps/breed0_0.png'),
        lambda: write_xml(folder / 'annotations/xmls/breed0_0.xml', (80, 60), (9, 6, 40, 30)),
        lambda: labels.write_text(labels.read_text().replace('_0 1 1', '_0 1 2')),
    ]
    for change, border in [*zip(changes, ['pet'] * 5), (changes[0], 'ignore')]:
        change()
        prepare(folder, tmp_path, '--border', border)
        with h5py.File(tmp_path / 'val/names.h5') as file:
            found.add(read_text(file['names'].attrs, 'preparation'))
    assert len(found) == 6


def test_download_asks_torchvision_for_the_dataset(monkeypatch, oxford, tmp_path):
    root, asked = oxford(10), []
    monkeypatch.setattr('torchvision.datasets.OxfordIIITPet', lambda root, download: asked.append((root, download)))
    prepare(root, tmp_path, '--download')
    assert asked == [(str(root), True)]


# ---- files that cannot be read


POSTSCRIPT = b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 80 60\n%%EndComments\n'  # Pillow would start a program


def test_images_that_cannot_be_read_are_named_counted_and_left_out(pets, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 80 * 60)
    folder = pets(20)
    half = (folder / 'images/breed0_0.jpg').read_bytes()[:1500]
    spoilt = {
        'breed0_0': (lambda path: path.write_bytes(b'no photograph'), 'not an image of a known kind'),
        'breed1_1': (lambda path: path.write_bytes(half), 'truncated'),
        'breed0_2': (lambda path: None, 'No such file'),
        'breed1_3': (lambda path: Image.new('L', (160, 120)).save(path), 'exceeds limit'),
        'breed0_4': (lambda path: path.write_bytes(POSTSCRIPT), 'not an image of a known kind'),
        'breed1_5': (os.mkfifo, 'is not a file'),  # waited for, it would never end
    }
    for name, (spoil, _) in spoilt.items():
        path = folder / f'images/{name}.jpg'
        path.unlink()
        spoil(path)
    prepare(folder, tmp_path / 'out')
    output = capsys.readouterr()
    for name, (_, message) in spoilt.items():
        (warning,) = [line for line in output.err.splitlines() if f'{name}.jpg: ' in line]
        assert message in warning
    assert 'unreadable images left out: 6 ' in output.out
    assert sum(len(names(tmp_path / 'out', split)) for split in SPLITS) == 14


def test_if_no_image_can_be_read_the_first_path_is_named(pets, tmp_path, error_line):
    folder = pets(12)
    (folder / 'images').rename(folder / 'elsewhere')
    line = error_line(main, '--root', folder, '--out', tmp_path / 'out')
    assert f'none of the 12 images can be read, the first is {folder}/images/breed' in line
    assert '.jpg: No such file or directory; each NAME in list.txt needs an image images/NAME.jpg' in line
    assert not (tmp_path / 'out').exists()


def test_an_image_that_is_damaged_meanwhile_is_named_and_nothing_written(pets, tmp_path, error_line, monkeypatch):
    folder = pets(12)
    (folder / 'images/breed0_4.jpg').unlink()
    monkeypatch.setattr('data_prepare.group_duplicates', lambda records, source: [[record] for record in records])
    line = error_line(main, '--root', folder, '--out', tmp_path / 'out', '--split', '60-20-20')
    assert 'breed0_4.jpg: No such file or directory' in line
    assert not list((tmp_path / 'out').rglob('*.h5*'))


LAUGHS = ''.join(f'<!ENTITY a{i} "{f"&a{i - 1};" * 10}">' for i in range(1, 12))


@pytest.mark.parametrize(
    'content, box',
    [
        ('{}', (8, 6, 'inf', 30)),
        ('{}', (500, 500, 600, 600)),
        ('<annotation/>', ()),
        ('<?xml version="1.0" encoding="x"?>{}', (8, 6, 40, 30)),
        (f'<!DOCTYPE b [<!ENTITY a0 "ha">{LAUGHS}]>{{}}', (8, 6, '&a11;', 30)),
    ],
    ids=['infinite', 'outside', 'empty', 'encoding', 'a billion laughs'],
)
def test_a_box_that_makes_no_sense_is_left_out(pets, capsys, content, box):
    folder = pets(1, boxes=[0])
    path = folder / 'annotations/xmls/breed0_0.xml'
    write_xml(path, (80, 60), box)
    path.write_text(content.replace('{}', path.read_text()))
    source, _, _, found = read_first(folder)
    assert np.isnan(found).all()
    assert len(source.unreadable) == 1 and f'warning: {path}: ' in capsys.readouterr().err


@pytest.mark.parametrize('mode, colour, kept', [('F', 1.0, False), ('I;16', 1, True)])
def test_trimaps_hold_whole_numbers(pets, mode, colour, kept):
    folder = pets(1, masks=[0])
    Image.new(mode, (80, 60), colour).save(folder / 'annotations/trimaps/breed0_0.png', format='TIFF')
    source, _, mask, _ = read_first(folder)
    assert np.unique(mask) == (1 if kept else 255)
    assert len(source.unreadable) == (not kept)


@pytest.mark.parametrize(
    'text, message',
    [
        ('breed0_0 1', 'is not NAME CLASS-ID SPECIES BREED-ID'),
        ('breed0_0 1 3 1', 'with classes 1 to 37 and species 1 or 2'),
        ('../breed0_0 1 1 1', 'not a file name like'),
        ('a_\x1b[2J 1 1 1', 'not a file name like'),
        ('breed0_0 1 1 1\nbreed0_0 1 1 1', 'listed twice'),
        ('breed0_0 1 1 1\nbreed1_1 1 1 1', "'breed0' and 'breed1'"),
    ],
)
def test_a_wrong_line_in_the_list_is_named(pets, tmp_path, error_line, text, message):
    folder = pets(2)
    (folder / 'annotations/list.txt').write_text(text)
    line = error_line(main, '--root', folder, '--out', tmp_path / 'out')
    assert message in line and f'{folder}/annotations/list.txt, line ' in line and line.isprintable()


def test_a_missing_dataset_is_named(tmp_path, error_line):
    line = error_line(main, '--source', 'oxford', '--root', tmp_path)
    assert 'list.txt' in line and '--download' in line


# ---- replacing files


@pytest.mark.parametrize('limit', [0, 300_000])
def test_full_disk_leaves_the_earlier_files(data, limit):
    assert_full_disk_leaves_files(main, ['--limit', '40', '--size', '64', '--out', data], data, limit)


@pytest.mark.slow
def test_failed_write_at_any_size_leaves_the_earlier_files(tmp_path):
    """HDF5 can crash when a write fails while it closes a file."""
    options = ['--limit', '10', '--size', '64', '--split', '60-20-20', '--out', tmp_path]
    main(list(map(str, options)))
    size = max(path.stat().st_size for path in tmp_path.rglob('*.h5'))
    for limit in range(0, size, 512):
        assert_full_disk_leaves_files(main, options, tmp_path, limit)


def test_its_own_files_are_replaced_also_if_they_are_rechunked(data):
    main(['--limit', '10', '--size', '64', '--split', '60-20-20', '--out', str(data)])
    assert len(read(data, 'train', 'images')) == 6 and len(read(data, 'val', 'masks')) == 2


def without_preparation(path):
    with h5py.File(path, 'r+') as file:
        del file['masks'].attrs['preparation']


@pytest.mark.parametrize('make', [without_preparation, lambda path: path.write_text('all my work')])
def test_files_that_it_did_not_make_are_not_replaced(data, error_line, make):
    make(data / 'val/masks.h5')
    before = h5_files(data)
    line = error_line(main, '--limit', 40, '--size', 64, '--out', data)
    assert 'val/masks.h5: was not made by data_prepare.py, or is damaged, and is left alone' in line
    assert before == h5_files(data)


def test_nothing_is_written_when_a_split_stays_empty(pets, tmp_path, error_line):
    line = error_line(main, '--root', pets(2), '--out', tmp_path / 'out', '--size', 64)
    assert 'split is empty' in line and not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
    'options',
    ['--split 80-20', '--split nan-1-1', '--split official', '--seed -1', '--limit 0', '--size 100', '--masks .']
    + ['--split 60-20-20 --folds 3'],
)
def test_options_that_make_no_sense_are_refused(options, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*options.split(), '--out', str(tmp_path / 'out')])
    assert stopped.value.code == 2 and options.split()[0] in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()
