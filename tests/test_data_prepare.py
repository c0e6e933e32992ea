"""Photographs to HDF5 splits."""

import os
import struct
import zlib

import h5py
import numpy as np
import pytest
from conftest import assert_full_disk_leaves_files, write_xml
from PIL import Image

from data_prepare import Record, in_strata_order, main, split_records
from support.files import to_rgb
from support.hdf5 import SPLITS, read_text
from support.splits import limited


def read(root, split, stem):
    with h5py.File(root / split / f'{stem}.h5') as file:
        return file[stem][()]


def names(root, split):
    return [name.decode() for name in read(root, split, 'names')]


def records(count):
    return [Record(f'pet_{i}', i % 2, i % 5, has_mask=i % 6 == 0, has_box=i % 2 == 0) for i in range(count)]


def test_each_split_has_its_share_of_every_label_and_breed():
    splits = split_records(in_strata_order(records(600), seed=1), (80, 10, 10))
    for split, count in zip(SPLITS, (480, 60, 60)):
        found = splits[split]
        assert len(found) == count
        assert sum(r.has_mask for r in found) == pytest.approx(count / 6, abs=2)
        assert sum(r.has_box for r in found) == pytest.approx(count / 2, abs=2)
        for breed in range(5):
            assert sum(r.breed == breed for r in found) == pytest.approx(count / 5, abs=3)


def test_the_split_depends_on_the_seed_and_not_on_the_order_of_files():
    shuffled = [records(100)[i] for i in np.random.default_rng(0).permutation(100)]
    first, again, other = (
        split_records(in_strata_order(r, seed), (80, 10, 10))
        for r, seed in ((records(100), 0), (shuffled, 0), (shuffled, 1))
    )
    assert first == again
    assert first != other


def test_no_photograph_is_in_two_splits_or_in_none():
    splits = split_records(in_strata_order(records(101), seed=0), (60, 20, 20))
    assert sorted(r for part in splits.values() for r in part) == sorted(records(101))


def test_a_limit_takes_a_stratified_part():
    part = limited(in_strata_order(records(600), seed=0), 60)
    assert len(part) == 60 == len(set(part))
    assert sum(r.has_mask for r in part) == pytest.approx(10, abs=1)


def test_a_photograph_is_kept_with_the_labels_it_has(oxford, tmp_path, capsys):
    root = oxford(40, masks=range(0, 40, 4), boxes=range(0, 40, 2))
    main(['--root', str(root), '--out', str(tmp_path / 'out'), '--size', '64', '--split', '50-25-25'])
    out = tmp_path / 'out'
    assert [len(read(out, split, 'images')) for split in SPLITS] == [20, 10, 10]
    for split in SPLITS:
        for i, name in enumerate(names(out, split)):
            number = int(name.rpartition('_')[2])
            assert (read(out, split, 'masks')[i] == 255).all() == (number % 4 != 0)
            assert np.isnan(read(out, split, 'bboxes')[i]).all() == (number % 2 != 0)
            assert read(out, split, 'breeds')[i] == number % 2 == read(out, split, 'binary')[i]
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ['split', 'images', 'masks', 'boxes', 'cats', 'dogs', 'breeds']
    masks = sum(int(line.split()[2]) for line in table[1:4])
    assert masks == 10


def test_files_have_the_documented_types_and_class_names(oxford, tmp_path):
    root = oxford(10, masks=range(10), boxes=range(10))
    main(['--root', str(root), '--out', str(tmp_path), '--size', '64', '--split', '60-20-20'])
    expected = {
        'images': ('uint8', (6, 64, 64, 3)),
        'masks': ('uint8', (6, 64, 64, 1)),
        'bboxes': ('float32', (6, 4)),
        'binary': ('uint8', (6, 1)),
        'breeds': ('int16', (6, 1)),
    }
    for stem, (dtype, shape) in expected.items():
        with h5py.File(tmp_path / 'train' / f'{stem}.h5') as file:
            assert list(file) == [stem]
            assert (file[stem].dtype, file[stem].shape) == (dtype, shape)
    with h5py.File(tmp_path / 'train' / 'breeds.h5') as file:
        assert read_text(file['breeds'].attrs, 'class_names') == ['breed0', 'breed1']


@pytest.mark.parametrize('border, value', [('pet', 1), ('background', 0), ('ignore', 255)])
def test_the_border_counts_as_asked(oxford, tmp_path, border, value):
    root = oxford(10, size=(64, 64), masks=range(10))
    main(['--root', str(root), '--out', str(tmp_path), '--size', '64', '--border', border, '--split', '60-20-20'])
    row = read(tmp_path, 'train', 'masks')[0, 0, :, 0]
    assert row.tolist() == [1] * 28 + [value] * 8 + [0] * 28


def test_boxes_are_scaled_by_the_size_in_the_xml(oxford, tmp_path):
    root = oxford(10, size=(80, 60), boxes=range(10))
    for path in (root / 'oxford-iiit-pet/annotations/xmls').iterdir():
        write_xml(path, (160, 120), (16, 12, 80, 60))  # annotated at twice the size on disk
    main(['--root', str(root), '--out', str(tmp_path), '--size', '64', '--split', '60-20-20'])
    np.testing.assert_allclose(read(tmp_path, 'train', 'bboxes')[0], [6.4, 6.4, 32, 32], rtol=1e-6)


@pytest.mark.parametrize(
    'mode, colour',
    [
        ('RGB', (200, 100, 50)),
        ('RGBA', (200, 100, 50, 255)),
        ('P', None),
        ('L', 90),
        ('CMYK', (0, 90, 9, 0)),
        ('LA', (90, 255)),
        ('1', 1),
        ('I;16', 90 * 256),
        ('I', 90),
        ('I', 90 * 256),
        ('F', 90.0),
    ],
)
def test_every_mode_becomes_rgb(mode, colour):
    photograph = (
        Image.new('RGB', (8, 6), (200, 100, 50)).convert('P', palette=Image.Palette.ADAPTIVE)
        if colour is None
        else Image.new(mode, (8, 6), colour)
    )
    rgb = to_rgb(photograph)
    assert (rgb.mode, rgb.size) == ('RGB', (8, 6))
    if mode in ('RGB', 'RGBA', 'P'):
        assert rgb.getpixel((3, 3)) == (200, 100, 50)
    if mode in ('L', 'LA', 'I;16', 'I', 'F'):
        assert rgb.getpixel((3, 3)) == (90, 90, 90)


def test_exif_rotation_is_not_applied(oxford, tmp_path):
    root = oxford(10, size=(64, 64))
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:32] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees
    for path in (root / 'oxford-iiit-pet/images').iterdir():
        Image.fromarray(pixels).save(path, exif=exif, quality=95)
    main(['--root', str(root), '--out', str(tmp_path), '--size', '64', '--split', '60-20-20'])
    image = read(tmp_path, 'train', 'images')[0]
    assert image[:30].min() > 240 and image[34:].max() < 15


def test_unreadable_files_are_named_counted_and_left_out(oxford, tmp_path, capsys):
    root = oxford(20, masks=range(20), boxes=range(20))
    folder = root / 'oxford-iiit-pet'
    (folder / 'images/breed0_0.jpg').write_bytes(b'no photograph')
    jpeg = (folder / 'images/breed1_1.jpg').read_bytes()
    (folder / 'images/breed1_1.jpg').write_bytes(jpeg[: len(jpeg) // 2])
    (folder / 'images/breed0_2.jpg').unlink()
    (folder / 'annotations/xmls/breed1_3.xml').write_text('<annotation><size>')
    write_xml(folder / 'annotations/xmls/breed0_4.xml', (80, 60), (40, 6, 8, 30))
    (folder / 'annotations/xmls/breed1_5.xml').write_text('<annotation/>')
    (folder / 'annotations/xmls/breed1_7.xml').write_text('<?xml version="1.0" encoding="x"?><a/>')
    Image.new('L', (80, 60), 7).save(folder / 'annotations/trimaps/breed0_6.png')
    out = tmp_path / 'out'
    main(['--root', str(root), '--out', str(out), '--size', '64', '--split', '60-20-20'])
    output = capsys.readouterr()
    for name in (
        'breed0_0.jpg',
        'breed1_1.jpg',
        'breed0_2.jpg',
        'breed1_3.xml',
        'breed0_4.xml',
        'breed1_5.xml',
        'breed1_7.xml',
        'breed0_6.png',
    ):
        assert sum(name in line for line in output.err.splitlines()) == 1
    assert 'unreadable images left out: 3' in output.out
    assert 'unreadable annotations left out: 5' in output.out
    kept = [name for split in SPLITS for name in names(out, split)]
    assert len(kept) == 17 and 'breed0_6' in kept  # without its mask


def png_of_size(side):
    """A sound PNG file whose header promises side x side pixels."""

    def chunk(kind, data):
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

    header = struct.pack('>IIBBBBB', side, side, 8, 0, 0, 0, 0)
    return (
        b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(bytes(99))) + chunk(b'IEND', b'')
    )


@pytest.mark.parametrize(
    'spoil',
    [
        lambda path: path.write_bytes(png_of_size(30_000)),
        lambda path: path.write_bytes(
            b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 80 60\n%%EndComments\n'
        ),  # a program
        os.mkfifo,  # waited for, it would never end
        os.mkdir,
        lambda path: path.symlink_to('/dev/zero'),
    ],
    ids=['a bomb', 'EPS', 'a pipe', 'a folder', 'a device'],
)
def test_files_that_are_no_images_are_left_out(oxford, tmp_path, capsys, spoil):
    root = oxford(20)
    path = root / 'oxford-iiit-pet/images/breed0_0.jpg'
    path.unlink()
    spoil(path)
    main(['--root', str(root), '--out', str(tmp_path / 'out'), '--size', '64', '--split', '60-20-20'])
    output = capsys.readouterr()
    assert 'unreadable images left out: 1' in output.out
    (warning,) = [line for line in output.err.splitlines() if 'breed0_0.jpg: ' in line]
    if path.is_file() and path.read_bytes().startswith(b'%!PS'):
        assert 'cannot identify image file' in warning  # Pillow knows EPS, and is not to try it


def test_any_error_of_a_decoder_is_a_damaged_image(oxford, tmp_path, capsys, monkeypatch):
    root, convert = oxford(20), Image.Image.convert
    monkeypatch.setattr(
        Image.Image, 'convert', lambda self, *a, **kw: {}[0] if '_3.jpg' in self.filename else convert(self, *a, **kw)
    )
    monkeypatch.setattr('support.files.to_rgb', lambda image: image.convert('RGB'))
    main(['--root', str(root), '--out', str(tmp_path / 'out'), '--size', '64', '--split', '60-20-20'])
    assert 'unreadable images left out: 1' in capsys.readouterr().out


LAUGHS = ''.join(f'<!ENTITY a{i} "{f"&a{i - 1};" * 10}">' for i in range(1, 12))


@pytest.mark.parametrize(
    'before, box',
    [
        ('', ('nan', 6, 40, 30)),
        ('', (8, 6, 'inf', 30)),
        ('', ('-inf', 6, 40, 30)),
        ('', (500, 500, 600, 600)),
        (f'<!DOCTYPE b [<!ENTITY a0 "ha">{LAUGHS}]>', (8, 6, '&a11;', 30)),
    ],
    ids=['NaN', 'infinite', 'negative infinite', 'outside', 'a billion laughs'],
)
def test_an_annotation_that_makes_no_sense_is_left_out(oxford, tmp_path, capsys, before, box):
    root = oxford(20, boxes=range(20))
    path = root / 'oxford-iiit-pet/annotations/xmls/breed0_0.xml'
    write_xml(path, (80, 60), box)
    path.write_text(before + path.read_text())
    main(['--root', str(root), '--out', str(tmp_path / 'out'), '--size', '64', '--split', '60-20-20'])
    assert 'unreadable annotations left out: 1' in capsys.readouterr().out


def test_a_name_that_cannot_be_printed_or_is_too_long_is_refused(oxford, tmp_path, error_line):
    root = oxford(2)
    path = root / 'oxford-iiit-pet/annotations/list.txt'
    for name in 'a_\x1b[2J', 'a_\0b', 'a_' + 'x' * 300, 'x' * 101 + '_1', 'without', '_1':
        path.write_text(f'{name} 1 1 1\n')
        line = error_line(main, '--root', root, '--out', tmp_path / 'out')
        assert 'is not a file name like Abyssinian_12' in line and line.isprintable()


@pytest.mark.parametrize('limit', [0, 100, 3000, 5000, 300_000, 500_000])
def test_full_disk_leaves_the_earlier_files(data, limit):
    assert_full_disk_leaves_files(main, ['--limit', '90', '--size', '64', '--out', data], data, limit)


@pytest.mark.slow
def test_failed_write_at_any_size_leaves_the_earlier_files(tmp_path):
    """HDF5 crashes when a write fails while it closes a file with a chunk cache."""
    options = ['--limit', '20', '--size', '64', '--split', '60-20-20', '--out', tmp_path]
    main(list(map(str, options)))
    size = max(path.stat().st_size for path in tmp_path.rglob('*.h5'))
    for limit in range(0, size, 256):
        assert_full_disk_leaves_files(main, options, tmp_path, limit)


def test_preparing_again_writes_the_same_bytes(oxford, tmp_path):
    root = oxford(20, masks=range(5), boxes=range(9))
    for out in ('a', 'b'):
        main(['--root', str(root), '--out', str(tmp_path / out), '--size', '64', '--split', '60-20-20'])
    for path in (tmp_path / 'a').rglob('*.h5'):
        twin = tmp_path / 'b' / path.relative_to(tmp_path / 'a')
        assert path.read_bytes() == twin.read_bytes()


def test_download_asks_torchvision_for_the_dataset(monkeypatch, oxford, tmp_path):
    root, asked = oxford(10), []
    monkeypatch.setattr('torchvision.datasets.OxfordIIITPet', lambda root, download: asked.append((root, download)))
    main(['--download', '--root', str(root), '--out', str(tmp_path), '--size', '64', '--split', '60-20-20'])
    assert asked == [(str(root), True)]


def test_synthetic_pets_are_the_default_and_fully_labelled(shared_data):
    for split in SPLITS:
        assert set(np.unique(read(shared_data, split, 'masks'))) == {0, 1}
        assert not np.isnan(read(shared_data, split, 'bboxes')).any()


def test_files_made_elsewhere_are_not_replaced(original_files, error_line):
    root = original_files()
    before = {path: path.read_bytes() for path in root.rglob('*.h5')}
    line = error_line(main, '--limit', 40, '--size', 64, '--out', root)
    assert 'was not made by data_prepare.py, or is damaged, and is left alone' in line
    assert before == {path: path.read_bytes() for path in root.rglob('*.h5')}


@pytest.mark.parametrize('libver, link', [('earliest', False), ('v110', True)], ids=['older format', 'link'])
def test_copies_of_its_files_made_by_other_programs_are_not_replaced(data, error_line, libver, link):
    path, other = data / 'val' / 'masks.h5', data / 'masks.h5'
    path.rename(other)
    with h5py.File(path, 'w', libver=libver) as file, h5py.File(other) as source:
        if link:
            file['masks'] = h5py.ExternalLink(str(other), 'masks')
        else:
            source.copy('masks', file)
    before = path.read_bytes()
    assert 'val/masks.h5: was not made by' in error_line(main, '--limit', 40, '--size', 64, '--out', data)
    assert path.read_bytes() == before


def test_its_own_files_are_replaced(data):
    main(['--limit', '40', '--size', '64', '--split', '60-20-20', '--out', str(data)])
    assert len(read(data, 'train', 'images')) == 24 and len(read(data, 'val', 'masks')) == 8


def test_a_file_that_is_no_hdf5_is_not_replaced(data, error_line):
    """Also at the end of a symbolic link, it may be anything."""
    thesis = data / 'thesis.txt'
    thesis.write_text('all my work')
    (data / 'val' / 'masks.h5').unlink()
    (data / 'val' / 'masks.h5').symlink_to(thesis)
    before = {path: path.read_bytes() for path in data.rglob('*.h5')}
    assert 'val/masks.h5: was not made by' in error_line(main, '--limit', 40, '--size', 64, '--out', data)
    assert before == {path: path.read_bytes() for path in data.rglob('*.h5')}


@pytest.mark.parametrize(
    'option',
    [
        ('--split', '80-20'),
        ('--split', 'nan-1-1'),
        ('--seed', '-1'),
        ('--limit', '0'),
        ('--size', '100'),
        ('--border', 'grey'),
        ('--source', 'synthetic', '--root', '.'),
    ],
)
def test_options_that_make_no_sense_are_refused(option, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*option, '--out', str(tmp_path / 'out')])
    assert stopped.value.code == 2 and option[0] in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()


def test_nothing_is_written_when_a_split_stays_empty(oxford, tmp_path, error_line):
    root, out = oxford(2), tmp_path / 'out'
    line = error_line(main, '--root', root, '--out', out, '--size', 64)
    assert 'split is empty' in line
    assert not [path for path in out.rglob('*') if path.is_file() and path.name != '.lock']


@pytest.mark.parametrize(
    'text, message',
    [
        ('breed0_0 1', 'is not NAME CLASS-ID'),
        ('breed0_0 99 1 1', 'class 99'),
        ('breed0_0 1 3 1', 'species 3'),
        ('../breed0_0 1 1 1', 'not a file name like'),
        ('breed0_0 1 1 1\nbreed0_0 1 1 1', 'listed twice'),
        ('breed0_0 1 1 1\nbreed1_1 1 1 1', "'breed0' and 'breed1'"),
    ],
)
def test_a_wrong_line_in_the_list_is_named(oxford, tmp_path, error_line, text, message):
    root = oxford(2)
    path = root / 'oxford-iiit-pet/annotations/list.txt'
    path.write_text(text)
    line = error_line(main, '--root', root, '--out', tmp_path / 'out')
    assert message in line and f'{path}, line ' in line


@pytest.mark.parametrize('mode, colour, kept', [('1', 1, False), ('F', 1.0, False), ('I;16', 1, True), ('L', 1, True)])
def test_trimaps_hold_whole_numbers(oxford, tmp_path, capsys, mode, colour, kept):
    root = oxford(20, masks=range(20))
    path = root / 'oxford-iiit-pet/annotations/trimaps/breed0_0.png'
    Image.new(mode, (80, 60), colour).save(path, format='TIFF')
    main(['--root', str(root), '--out', str(tmp_path / 'out'), '--size', '64', '--split', '60-20-20'])
    assert ('unreadable annotations left out: 1' not in capsys.readouterr().out) == kept


def test_list_with_a_byte_order_mark_is_read(oxford, tmp_path):
    root = oxford(10)
    path = root / 'oxford-iiit-pet/annotations/list.txt'
    path.write_bytes(b'\xef\xbb\xbf' + b'\n'.join(path.read_bytes().splitlines()[1:]))
    main(['--root', str(root), '--out', str(tmp_path / 'out'), '--size', '64', '--split', '60-20-20'])


def test_repaired_annotation_makes_another_preparation(oxford, tmp_path):
    root, found = oxford(10, boxes=range(10)), []
    path = root / 'oxford-iiit-pet/annotations/xmls/breed0_0.xml'
    for content in '', path.read_text():
        path.write_text(content)
        main(['--root', str(root), '--out', str(tmp_path / 'out'), '--size', '64', '--split', '60-20-20'])
        with h5py.File(tmp_path / 'out' / 'train' / 'images.h5') as file:
            found.append(read_text(file['images'].attrs, 'preparation'))
    assert found[0] != found[1]


def test_a_missing_dataset_is_named(tmp_path, error_line):
    line = error_line(main, '--source', 'oxford', '--root', tmp_path)
    assert 'list.txt' in line and '--download' in line
