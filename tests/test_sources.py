"""Images, masks and labels of one's own, through data_prepare.py."""

import importlib
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, read_h5
from PIL import Image

import data_rechunk
import export_onnx
import mtl_vis
from data_prepare import main
from support.hdf5 import SPLITS
from support.splits import read_split


@pytest.fixture
def own(tmp_path):
    """A function that writes ten images of 40 x 30, `mask` for each and labels.csv, and returns them as options."""

    def make(mask=None, labels=None):
        images, masks, table = tmp_path / 'images' / 'a', tmp_path / 'masks' / 'a', tmp_path / 'labels.csv'
        images.mkdir(parents=True)
        for number in range(10):
            pixels = np.random.default_rng(number).integers(0, 256, (30, 40, 3), np.uint8)
            Image.fromarray(pixels).save(images / f'{number}.png')
        options = ['--images', images.parent]
        if mask:
            masks.mkdir(parents=True)
            for number in range(10):
                mask.save(masks / f'{number}.png')
            options += ['--masks', masks.parent]
        if labels:
            table.write_text(labels)
            options += ['--labels', table]
        return options

    return make


def prepare(options, out):
    main([*map(str, options), '--out', str(out), '--size', '64', '--split', '60-20-20'])


def read_all(out, stem):
    """{name: value} of a file of all splits."""
    names, values = (
        np.concatenate([read_h5(out / split / f'{each}.h5') for split in SPLITS]) for each in ('names', stem)
    )
    return dict(zip([name.decode() for name in names], values))


def mask_of(background, pet, border, mode='L'):
    """A mask, its left half pet."""
    values = np.full((30, 40), background, np.uint8)
    values[:, :20], values[:, 20:22] = pet, border
    image = Image.fromarray(values)
    if mode == 'P':
        image.putpalette(bytes(range(256)) * 3)
        return image
    return image.convert(mode)


@pytest.mark.parametrize(
    'mask, border',
    [
        (mask_of(0, 255, 0), 0),
        (mask_of(0, 255, 0, '1'), 0),
        (mask_of(0, 255, 0, 'RGB'), 0),
        (mask_of(0, 1, 255, 'P'), 255),
        (mask_of(2, 1, 3), 1),
    ],
    ids=['0 and 255', '1 bit', 'RGB', '0, 1 and 255 with a palette', 'trimap'],
)
def test_masks_of_all_usual_kinds(own, tmp_path, mask, border):
    prepare(own(mask), tmp_path / 'out')
    for values in read_all(tmp_path / 'out', 'masks').values():
        assert (values[:, :30] == 1).all() and (values[:, 33:34] == border).all() and (values[:, 37:] == 0).all()


def test_labels_are_those_of_the_csv_and_what_is_missing_or_does_not_fit_is_unknown(own, tmp_path, capsys):
    labels = (
        '\ufeffImage,Class,xmin,ymin,xmax,ymax,note\na/0.png,pear,10,15,20,30,x\na/1,apple,,,,,\n\n'
        'a/2.png,,0,0,40.5,30,\na/3,,10,10,90,30,\ngone.png,pear,,,,,\n'
    )
    out = tmp_path / 'out'
    prepare(own(labels=labels), out)
    output = capsys.readouterr()
    assert 'labels.csv: columns that are not used: note' in output.out
    assert 'labels.csv: labels without an image: 1 (gone)' in output.out
    assert 'box of a/3: [10.0, 10.0, 90.0, 30.0] reaches outside its image of 40 x 30' in output.err
    breeds, boxes = read_all(out, 'breeds'), read_all(out, 'bboxes')
    assert [breeds[f'a/{number}'].item() for number in range(4)] == [1, 0, -1, -1]
    assert boxes['a/0'].tolist() == [16, 32, 32, 64] and boxes['a/2'].tolist() == [0, 0, 64, 64]
    assert np.isnan([boxes['a/1'], boxes['a/3']]).all() and (read_all(out, 'binary')['a/0'] == -1).all()
    data_rechunk.main(['--data', str(out)])
    split = read_split(out / 'train')
    assert split.class_names == ['apple', 'pear'] and split.class_species == [None, None]


def test_a_species_without_a_class_is_the_class(own, tmp_path):
    prepare(own(labels='image,species\na/0,Cat\na/1,dog\n'), tmp_path / 'out')
    found = read_all(tmp_path / 'out', 'breeds')
    assert [found[f'a/{number}'].item() for number in range(3)] == [0, 1, -1]


def test_masks_that_do_not_fit_are_named_and_unknown(own, tmp_path, capsys):
    options, masks = own(mask_of(0, 1, 1)), tmp_path / 'masks'
    Image.new('L', (30, 40), 1).save(masks / 'a' / '0.png')
    (masks / 'a' / '1.png').write_text('no image')
    Image.new('RGB', (40, 30), 'red').save(masks / 'a' / '2.png')
    Image.new('L', (40, 30)).save(masks / 'other.png')
    prepare(options, tmp_path / 'out')
    output = capsys.readouterr()
    assert 'masks: masks without an image: 1 (other)' in output.out and 'left out: 3 ' in output.out
    assert '0.png: is 30 x 40 and its image 40 x 30' in output.err and '2.png: holds colours' in output.err
    unknown = [name for name, values in read_all(tmp_path / 'out', 'masks').items() if (values == 255).all()]
    assert sorted(unknown) == ['a/0', 'a/1', 'a/2']


@pytest.mark.parametrize(
    'labels, message',
    [
        ('name,class\na/0,pear\n', r"its first line is \['name', 'class'\]; expected a column 'image'"),
        ('image,class\na/0,pear\na/0.png,pear\n', "labels.csv, line 3: image 'a/0.png' is empty or listed twice"),
        ('image,species\na/0,bird\n', "line 2: species 'bird'; expected cat, dog or nothing"),
        ('image,xmin,ymin,xmax,ymax\na/0,1,2,3,\n', 'line 2: the box .* is not four numbers in pixels, or nothing'),
        ('image;class\na/0;pear\n', 'each column once; save it with commas'),
        ('image,class\n0,pear\n', 'none of the 1 labels has the name of an image .0 and a/0.; it is the path below'),
    ],
)
def test_labels_that_cannot_be_told_are_one_line(own, tmp_path, error_line, labels, message):
    assert re.search(message, error_line(main, *own(labels=labels), '--out', tmp_path / 'out'))
    assert not (tmp_path / 'out').exists()


def test_masks_of_which_none_can_be_used_are_refused(own, tmp_path, error_line):
    options = own(mask_of(0, 7, 7))
    line = error_line(main, *options)
    assert 'masks: holds the values 0 (0.png), 7 (0.png); masks are 0 and 1, 0 and 255, or trimaps' in line
    for path in sorted((tmp_path / 'masks' / 'a').iterdir()):
        path.write_text('no image')
    assert 'masks: none of its masks can be used' in error_line(main, *options)
    (tmp_path / 'masks' / 'a').rename(tmp_path / 'masks' / 'b')
    assert 'none of the 10 masks has the name of an image (b/0 and a/0)' in error_line(main, *options)


def test_names_that_are_there_twice_and_folders_without_images_are_refused(own, tmp_path, error_line):
    options = own()
    Image.new('RGB', (9, 9)).save(tmp_path / 'images' / 'a' / '0.jpg')
    assert '0.png: has the same name as 0.jpg; rename one of them' in error_line(main, *options)
    (tmp_path / 'images' / 'a' / '0.jpg').unlink()
    assert 'gone.csv: no such file' in error_line(main, *options, '--labels', tmp_path / 'gone.csv')
    (tmp_path / 'empty').mkdir()
    assert 'empty: finds no file that ends in .jpg' in error_line(main, '--images', tmp_path / 'empty')


def test_the_commands_of_the_documentation_run(tmp_path, monkeypatch, capsys):
    """On twenty drawn images that are no pets; other files test what the picture shows and the export itself."""
    page = (ROOT / 'docs' / 'data.md').read_text()
    part = page[page.index('## Images and masks of your own') :]
    script, commands = re.search(r'```python\n(.*?)```.*?```\n(.*?)```', part, re.DOTALL).groups()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mtl_vis, 'save_picture', lambda rows, path: Path(path).touch())
    monkeypatch.setattr(export_onnx, 'export', lambda *_: 0.0)
    exec(script, {})
    for line in commands.splitlines():
        python, name, *arguments = shlex.split(line)
        assert python == 'python'
        importlib.import_module(name.removesuffix('.py')).main(arguments)
    assert 'mine.onnx: ' in capsys.readouterr().out and (tmp_path / 'mask.png').exists()
