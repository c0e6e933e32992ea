"""Photographs to HDF5 splits."""

import os
import re
import shutil

import h5py
import numpy as np
import pytest
from conftest import assert_full_disk_leaves_files, read_h5, write_xml
from PIL import Image

import data_rechunk
from data_prepare import group_duplicates, in_strata_order, main, make_folds, match_thumbnails, split_groups
from support.hdf5 import SPLITS, read_text
from support.sources import OxfordPets, Record
from support.splits import limited, read_split


def prepare(root, out, *options, split='60-20-20'):
    main(['--root', str(root), '--out', str(out), '--size', '64', '--split', split, *options])


def read(root, split, stem):
    return read_h5(root / split / f'{stem}.h5')


def preparation(root):
    """The one of all files under `root`."""
    found = set()
    for path in root.rglob('*.h5'):
        with h5py.File(path) as file:
            found.add(read_text(file[path.stem].attrs, 'preparation'))
    (text,) = found
    return text


def names(root, split):
    return [name.decode() for name in read(root, split, 'names')]


def image_path(root, name):
    return root / f'oxford-iiit-pet/images/{name}.jpg'


def annotation_path(root, name):
    return root / f'oxford-iiit-pet/annotations/{name}'


def read_first(root, border='pet'):
    """An OxfordPets, and image, mask and box of its first record at 64 x 64."""
    source = OxfordPets(root, border)
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
    groups = [ordered[:3], *([record] for record in ordered[3:])]
    folds = make_folds(groups, 5)
    assert sorted(record for fold in folds for record in fold['test']) == sorted(ordered)
    for fold in folds:
        assert sorted(record for part in fold.values() for record in part) == sorted(ordered)
        assert [len(fold[split]) for split in SPLITS] == pytest.approx([420, 60, 120], abs=3)
        for part in fold.values():
            assert sum(r.has_mask for r in part) == pytest.approx(len(part) / 6, abs=3)
            assert len(set(ordered[:3]) & set(part)) in (0, 3)


def test_folds_are_written_and_rechunked_as_splits(oxford, tmp_path, capsys):
    root, out = oxford(30, masks=range(0, 30, 2), breeds=3), tmp_path / 'folds'
    for name in 'breed0_0', 'breed2_2':
        Image.new('L', (80, 60), 7).save(annotation_path(root, f'trimaps/{name}.png'))
    main(['--root', str(root), '--out', str(out), '--size', '64', '--folds', '3'])
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


def add_copies(root):
    """Let images 3, 10 and 17 be versions of image 0, and image 12 one of image 5; images 8 and 9 are damaged.

    Returns the two sets of names.
    """

    def path(number):
        return image_path(root, f'breed{number % 2}_{number}')

    for number, pixels in zip((0, 5), np.random.default_rng(1).integers(0, 256, (2, 6, 8, 3), dtype=np.uint8)):
        Image.fromarray(pixels).resize((80, 60), Image.Resampling.BICUBIC).save(path(number), quality=90)
    with Image.open(path(0)) as image:
        image.save(path(3), quality=40)
        image.point(lambda value: 40 + value * 0.7).save(path(10))
        image.resize((120, 90)).convert('L').save(path(17))
    shutil.copy(path(5), path(12))
    for number in 8, 9:
        path(number).write_bytes(path(7).read_bytes()[:2000])
    return [{'breed0_0', 'breed1_3', 'breed0_10', 'breed1_17'}, {'breed1_5', 'breed0_12'}]


@pytest.mark.parametrize('seed', range(2))
def test_copies_are_in_one_split(oxford, tmp_path, capsys, seed):
    root, out = oxford(20), tmp_path / 'out'
    copies, found = add_copies(root), []
    lines = annotation_path(root, 'list.txt')
    for _ in range(2):
        prepare(root, out, '--seed', str(seed), split='40-30-30')
        assert 'near-identical images: 6 in 2 groups, each kept in one split\n' in capsys.readouterr().out
        found.append([names(out, split) for split in SPLITS])
        lines.write_text('\n'.join(reversed(lines.read_text().splitlines())))
    assert all(any(group <= set(part) for part in found[0]) for group in copies)
    assert found[0] == found[1]  # whatever the order in the list


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
    first = np.random.default_rng(0).integers(0, 100, (3000, 16, 16), dtype=np.uint8)
    numbers = match_thumbnails(np.concatenate([first, first + 120]))
    assert (numbers[:3000] == numbers[3000:]).all() and len(set(numbers)) == 3000


# ---- the official split


def write_parts(root, test):
    """Write trainval.txt and test.txt, which has the images of these numbers."""
    folder = root / 'oxford-iiit-pet/annotations'
    lines = (folder / 'list.txt').read_text().splitlines()[1:]
    for name, members in ('trainval', set(range(len(lines))) - set(test)), ('test', set(test)):
        (folder / f'{name}.txt').write_text('\n'.join(lines[i] for i in sorted(members)))
    return folder


@pytest.mark.parametrize('seed', range(2))
def test_the_official_split_is_taken_as_it_is(oxford, tmp_path, capsys, seed):
    root, out, test = oxford(41, masks=range(0, 40, 4)), tmp_path / 'out', range(10, 20)
    path = write_parts(root, test) / 'trainval.txt'
    path.write_text(path.read_text().rpartition('\n')[0])  # image 40 is in neither file
    add_copies(root)  # 0 and 3 for training, 10 and 17 for the test; 5 and 12
    prepare(root, out, '--seed', str(seed), split='official')
    output = capsys.readouterr().out
    assert '6 in 2 groups, 2 of them across trainval.txt and test.txt (not moved)\n' in output
    assert names(out, 'test') == sorted(f'breed{i % 2}_{i}' for i in test)
    train, val = set(names(out, 'train')), set(names(out, 'val'))
    assert train | val == {f'breed{i % 2}_{i}' for i in range(40) if i not in (8, 9, *test)} and not train & val
    assert len(val) == pytest.approx(6, abs=2)
    assert {'breed0_0', 'breed1_3'} <= train or {'breed0_0', 'breed1_3'} <= val


def test_the_official_split_can_be_limited(oxford, tmp_path):
    root = oxford(40)
    write_parts(root, range(20))
    prepare(root, tmp_path, '--limit', '20', split='official')
    assert sum(len(names(tmp_path, split)) for split in SPLITS) == 20
    assert {int(name.rpartition('_')[2]) < 20 for name in names(tmp_path, 'test')} == {True}


@pytest.mark.parametrize(
    'file, text, message',
    [
        ('trainval', None, 'trainval.txt: no such file; take list.txt, trainval.txt and test.txt from one release'),
        ('test', '', 'test.txt: lists no image; '),
        ('trainval', 'breed0_0', "trainval.txt, line 1: 'breed0_0' is not NAME CLASS-ID"),
        ('test', 'breed0_0 1 1 1', "'breed0_0' is in both trainval.txt and test.txt; "),
        ('test', 'breed0_98 1 1 1', "'breed0_98' is not in list.txt, or of another class there; "),
        ('test', 'breed0_8 2 1 1', "'breed0_8' is not in list.txt, or of another class there; "),
    ],
)
def test_official_files_that_do_not_fit_are_named(oxford, tmp_path, error_line, file, text, message):
    root = oxford(10)
    path = write_parts(root, (8, 9)) / f'{file}.txt'
    path.unlink() if text is None else path.write_text(text)
    line = error_line(main, '--root', root, '--out', tmp_path / 'out', '--split', 'official')
    assert message in line and not (tmp_path / 'out').exists()


# ---- what is stored


def test_a_photograph_is_kept_with_the_labels_it_has_in_plain_datasets(oxford, tmp_path, capsys):
    prepare(oxford(40, masks=range(0, 40, 4), boxes=range(0, 40, 2)), tmp_path, split='50-25-25')
    for split in SPLITS:
        for i, name in enumerate(names(tmp_path, split)):
            number = int(name.rpartition('_')[2])
            assert (read(tmp_path, split, 'masks')[i] == 255).all() == (number % 4 != 0)
            assert np.isnan(read(tmp_path, split, 'bboxes')[i]).all() == (number % 2 != 0)
            assert read(tmp_path, split, 'breeds')[i] == number % 2 == read(tmp_path, split, 'binary')[i]
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert table[0] == ['split', 'images', 'masks', 'boxes', 'cats', 'dogs', 'classes']
    assert [row[0] for row in table[1:4]] == list(SPLITS)
    assert [sum(int(row[column]) for row in table[1:4]) for column in range(1, 6)] == [40, 10, 20, 20, 20]
    found = {}
    for path in (tmp_path / 'train').glob('*.h5'):
        with h5py.File(path) as file:
            (name,) = file
            found[name] = file[name].dtype, file[name].shape
            assert name == path.stem and file[name].chunks is None
            assert name != 'breeds' or read_text(file[name].attrs, 'class_names') == ['breed0', 'breed1']
    assert found == {
        'images': ('u1', (20, 64, 64, 3)),
        'masks': ('u1', (20, 64, 64, 1)),
        'bboxes': ('f4', (20, 4)),
        'binary': ('i1', (20, 1)),
        'breeds': ('i2', (20, 1)),
        'names': ('S9', (20,)),
    }


@pytest.mark.parametrize('border, value', [('pet', 1), ('background', 0), ('ignore', 255)])
def test_the_border_counts_as_asked(oxford, border, value):
    _, _, mask, _ = read_first(oxford(1, size=(64, 64), masks=[0]), border)
    assert mask[0, :, 0].tolist() == [1] * 28 + [value] * 8 + [0] * 28


@pytest.mark.parametrize('border, petless', [('pet', [3, 8]), ('background', [3, 5, 8])])
def test_a_mask_without_a_pet_is_unknown_and_named(oxford, tmp_path, capsys, border, petless):
    root = oxford(10, masks=range(10))
    for number, value in (3, 2), (5, 3), (8, 2):  # background only, border only
        Image.new('L', (80, 60), value).save(annotation_path(root, f'trimaps/breed{number % 2}_{number}.png'))
    prepare(root, tmp_path, '--border', border)
    output = capsys.readouterr()
    listed = ', '.join(sorted(f'breed{number % 2}_{number}' for number in petless))
    assert f'\nmasks without a pet, stored as unknown: {len(petless)} ({listed})\n' in output.out
    assert 'unreadable' not in output.out and 'warning' not in output.err
    for split in SPLITS:
        for name, mask in zip(names(tmp_path, split), read(tmp_path, split, 'masks')):
            assert (mask == 255).all() == (int(name.rpartition('_')[2]) in petless)
    assert sum(int(line.split()[2]) for line in output.out.splitlines()[1:4]) == 10 - len(petless)


def test_boxes_are_scaled_by_the_size_in_the_xml(oxford):
    root = oxford(1, size=(80, 60), boxes=[0])
    write_xml(annotation_path(root, 'xmls/breed0_0.xml'), (160, 120), (16, 12, 80, 60))  # twice the size on disk
    np.testing.assert_allclose(read_first(root)[3], [6.4, 6.4, 32, 32], rtol=1e-6)


def test_exif_rotation_is_not_applied(oxford):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees
    root = oxford(1, size=(64, 64), exif=exif)
    with Image.open(image_path(root, 'breed0_0')) as image:
        assert image.getexif() and np.array_equal(read_first(root)[1], image)


def test_preparing_again_writes_the_same_bytes_also_if_the_root_is_the_dataset_folder_itself(oxford, tmp_path):
    root = oxford(20, masks=range(5), boxes=range(9))
    prepare(root, tmp_path / 'a')
    prepare(root / 'oxford-iiit-pet', tmp_path / 'b')
    for path in (tmp_path / 'a').rglob('*.h5'):
        assert path.read_bytes() == (tmp_path / 'b' / path.relative_to(tmp_path / 'a')).read_bytes()


@pytest.mark.parametrize(
    'file, change, options',
    [
        ('images/breed0_0.jpg', lambda path: Image.new('RGB', (80, 60), 'red').save(path), ()),
        ('annotations/trimaps/breed0_0.png', lambda path: Image.new('L', (80, 60), 1).save(path), ()),
        ('annotations/xmls/breed0_0.xml', lambda path: write_xml(path, (80, 60), (9, 6, 40, 30)), ()),
        ('annotations/xmls/breed0_0.xml', os.remove, ()),
        ('annotations/list.txt', lambda path: path.write_text(path.read_text().replace('_0 1 1', '_0 1 2')), ()),
        ('annotations/list.txt', lambda path: None, ('--border', 'ignore')),
    ],
    ids=['image', 'mask', 'box', 'no box', 'label', 'option'],
)
def test_other_content_makes_another_preparation(oxford, tmp_path, file, change, options):
    root = oxford(10, masks=[0], boxes=[0])
    prepare(root, tmp_path / 'a')
    change(root / 'oxford-iiit-pet' / file)
    prepare(root, tmp_path / 'b', *options)
    assert preparation(tmp_path / 'a') != preparation(tmp_path / 'b')


def test_download_asks_torchvision_for_the_dataset(monkeypatch, oxford, tmp_path):
    root, asked = oxford(10), []
    monkeypatch.setattr('torchvision.datasets.OxfordIIITPet', lambda root, download: asked.append((root, download)))
    prepare(root, tmp_path, '--download')
    assert asked == [(str(root), True)]


# ---- files that cannot be read


def test_unreadable_files_are_named_counted_and_left_out(oxford, tmp_path, capsys):
    root = oxford(20, masks=range(20), boxes=range(20))
    image_path(root, 'breed0_0').write_bytes(b'no photograph')
    jpeg = image_path(root, 'breed1_1').read_bytes()
    image_path(root, 'breed1_1').write_bytes(jpeg[: len(jpeg) // 2])
    image_path(root, 'breed0_2').unlink()
    annotation_path(root, 'xmls/breed1_3.xml').write_text('<annotation><size>')
    Image.new('L', (80, 60), 7).save(annotation_path(root, 'trimaps/breed0_6.png'))
    prepare(root, tmp_path)
    output = capsys.readouterr()
    for name in 'breed0_0.jpg', 'breed1_1.jpg', 'breed0_2.jpg', 'breed1_3.xml', 'breed0_6.png':
        assert sum(name in line for line in output.err.splitlines()) == 1
    assert 'unreadable images left out: 3 ' in output.out
    assert 'unreadable annotations left out: 2 ' in output.out
    kept = [name for split in SPLITS for name in names(tmp_path, split)]
    assert len(kept) == 17 and 'breed0_6' in kept  # without its mask


@pytest.mark.parametrize('suffix', ['.JPG', '.jpg.jpg'], ids=['names in capitals', 'names with .jpg in the list'])
def test_if_no_image_can_be_read_the_first_path_is_named(oxford, tmp_path, error_line, suffix):
    root = oxford(12)
    if suffix == '.JPG':
        for path in (root / 'oxford-iiit-pet/images').iterdir():
            path.rename(path.with_suffix('.JPG'))
    else:
        path = annotation_path(root, 'list.txt')
        path.write_text(re.sub(r'(breed\S+)', r'\1.jpg', path.read_text()))
    line = error_line(main, '--root', root, '--out', tmp_path / 'out')
    path = '/oxford-iiit-pet/images/breed[01]_[0-9]+' + suffix.lower()
    what = 'No such file or directory; each NAME in list.txt needs an image images/NAME.jpg'
    assert re.search(f'error: none of the 12 images can be read, the first is .*{path}: {what}', line)
    assert not (tmp_path / 'out').exists()


def test_an_image_that_is_damaged_meanwhile_is_named_and_nothing_written(oxford, tmp_path, error_line, monkeypatch):
    root = oxford(12)
    monkeypatch.setattr(
        'data_prepare.split_groups', lambda *args: image_path(root, 'breed0_4').unlink() or split_groups(*args)
    )
    line = error_line(main, '--root', root, '--out', tmp_path / 'out', '--split', '60-20-20')
    assert 'breed0_4.jpg: No such file or directory' in line
    assert not list((tmp_path / 'out').rglob('*.h5*'))


POSTSCRIPT = b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 80 60\n%%EndComments\n'  # Pillow would start a program


@pytest.mark.parametrize(
    'spoil, message',
    [
        (lambda path: Image.new('L', (160, 120)).save(path), 'exceeds limit'),
        (lambda path: path.write_bytes(POSTSCRIPT), 'not an image of a known kind'),
        (os.mkfifo, 'is not a file'),  # waited for, it would never end
        (os.mkdir, 'is not a file'),
        (lambda path: path.symlink_to('/dev/zero'), 'is not a file'),
    ],
    ids=['a bomb', 'EPS', 'a pipe', 'a folder', 'a device'],
)
def test_files_that_are_no_images_are_left_out(oxford, capsys, monkeypatch, spoil, message):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 80 * 60)
    root = oxford(2)
    path = image_path(root, 'breed0_0')
    path.unlink()
    spoil(path)
    source = OxfordPets(root, 'pet')
    assert [[record.name for record in group] for group in group_duplicates(source.records, source)] == [['breed1_1']]
    output = capsys.readouterr()
    assert 'unreadable images left out: 1 ' in output.out
    (warning,) = [line for line in output.err.splitlines() if 'breed0_0.jpg: ' in line]
    assert message in warning


LAUGHS = ''.join(f'<!ENTITY a{i} "{f"&a{i - 1};" * 10}">' for i in range(1, 12))


@pytest.mark.parametrize(
    'content, box',
    [
        ('{}', ('nan', 6, 40, 30)),
        ('{}', (8, 6, 'inf', 30)),
        ('{}', (500, 500, 600, 600)),
        ('{}', (40, 6, 8, 30)),
        ('<annotation/>', ()),
        ('<?xml version="1.0" encoding="x"?>{}', (8, 6, 40, 30)),
        (f'<!DOCTYPE b [<!ENTITY a0 "ha">{LAUGHS}]>{{}}', (8, 6, '&a11;', 30)),
    ],
    ids=['NaN', 'infinite', 'outside', 'turned', 'empty', 'encoding', 'a billion laughs'],
)
def test_a_box_that_makes_no_sense_is_left_out(oxford, capsys, content, box):
    root = oxford(1, boxes=[0])
    path = annotation_path(root, 'xmls/breed0_0.xml')
    write_xml(path, (80, 60), box)
    path.write_text(content.replace('{}', path.read_text()))
    source, _, _, found = read_first(root)
    assert np.isnan(found).all()
    assert len(source.unreadable) == 1 and f'warning: {path}: ' in capsys.readouterr().err


@pytest.mark.parametrize('mode, colour, kept', [('1', 1, False), ('F', 1.0, False), ('I;16', 1, True), ('L', 1, True)])
def test_trimaps_hold_whole_numbers(oxford, mode, colour, kept):
    root = oxford(1, masks=[0])
    Image.new(mode, (80, 60), colour).save(annotation_path(root, 'trimaps/breed0_0.png'), format='TIFF')
    source, _, mask, _ = read_first(root)
    assert np.unique(mask) == (1 if kept else 255)
    assert len(source.unreadable) == (not kept)


@pytest.mark.parametrize(
    'text, message',
    [
        ('breed0_0 1', 'is not NAME CLASS-ID SPECIES BREED-ID'),
        ('breed0_0 99 1 1', 'with classes 1 to 37 and species 1 or 2'),
        ('breed0_0 1 3 1', 'with classes 1 to 37 and species 1 or 2'),
        ('../breed0_0 1 1 1', 'not a file name like'),
        ('breed0_0 1 1 1\nbreed0_0 1 1 1', 'listed twice'),
        ('breed0_0 1 1 1\nbreed1_1 1 1 1', "'breed0' and 'breed1'"),
        *(
            (f'{name} 1 1 1', 'not a file name')
            for name in ('a_\x1b[2J', 'a_' + 'x' * 300, 'x' * 101 + '_1', 'without')
        ),
    ],
)
def test_a_wrong_line_in_the_list_is_named(oxford, tmp_path, error_line, text, message):
    root = oxford(2)
    path = annotation_path(root, 'list.txt')
    path.write_text(text)
    line = error_line(main, '--root', root, '--out', tmp_path / 'out')
    assert message in line and f'{path}, line ' in line and line.isprintable()


def test_list_with_a_byte_order_mark_is_read(oxford):
    root = oxford(10)
    path = annotation_path(root, 'list.txt')
    path.write_bytes(b'\xef\xbb\xbf' + b'\n'.join(path.read_bytes().splitlines()[1:]))
    assert len(OxfordPets(root, 'pet').records) == 10


def test_a_missing_dataset_is_named(tmp_path, error_line):
    line = error_line(main, '--source', 'oxford', '--root', tmp_path)
    assert 'list.txt' in line and '--download' in line


# ---- replacing files


@pytest.mark.parametrize('limit', [0, 3000, 300_000])
def test_full_disk_leaves_the_earlier_files(data, limit):
    assert_full_disk_leaves_files(main, ['--limit', '90', '--size', '64', '--out', data], data, limit)


@pytest.mark.slow
def test_failed_write_at_any_size_leaves_the_earlier_files(tmp_path):
    """HDF5 can crash when a write fails while it closes a file."""
    options = ['--limit', '10', '--size', '64', '--split', '60-20-20', '--out', tmp_path]
    main(list(map(str, options)))
    size = max(path.stat().st_size for path in tmp_path.rglob('*.h5'))
    for limit in range(0, size, 512):
        assert_full_disk_leaves_files(main, options, tmp_path, limit)


def test_its_own_files_are_replaced_rechunked_or_not(data, tmp_path):
    for out in data, tmp_path / 'plain':
        for _ in range(2):
            main(['--limit', '10', '--size', '64', '--split', '60-20-20', '--out', str(out)])
        assert len(read(out, 'train', 'images')) == 6 and len(read(out, 'val', 'masks')) == 2


def in_older_format(path, other):
    with h5py.File(path, 'w') as file, h5py.File(other) as source:
        source.copy('masks', file)


def without_preparation(path, other):
    with h5py.File(path, 'w', libver='v110') as file:
        file['masks'] = read_h5(other, 'masks')


def linked(path, other):
    with h5py.File(path, 'w', libver='v110') as file:
        file['masks'] = h5py.ExternalLink(str(other), 'masks')


def no_hdf5(path, other):
    other.write_text('all my work')
    path.symlink_to(other)


@pytest.mark.parametrize('make', [in_older_format, without_preparation, linked, no_hdf5])
def test_files_that_it_did_not_make_are_not_replaced(data, error_line, make):
    path, other = data / 'val' / 'masks.h5', data / 'other.h5'
    path.rename(other)
    make(path, other)
    before = {path: path.read_bytes() for path in data.rglob('*.h5')}
    line = error_line(main, '--limit', 40, '--size', 64, '--out', data)
    assert 'val/masks.h5: was not made by data_prepare.py, or is damaged, and is left alone' in line
    assert before == {path: path.read_bytes() for path in data.rglob('*.h5')}


def test_nothing_is_written_when_a_split_stays_empty(oxford, tmp_path, error_line):
    line = error_line(main, '--root', oxford(2), '--out', tmp_path / 'out', '--size', 64)
    assert 'split is empty' in line and not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
    'options',
    ['--split 80-20', '--split nan-1-1', '--split official', '--seed -1', '--limit 0', '--size 100', '--border grey']
    + ['--source synthetic --root .', '--split 60-20-20 --folds 3'],
)
def test_options_that_make_no_sense_are_refused(options, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*options.split(), '--out', str(tmp_path / 'out')])
    assert stopped.value.code == 2 and options.split()[0] in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()
