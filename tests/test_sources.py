"""Images, masks and labels of one's own, through data_prepare.py."""

import importlib
import re
import shlex

import numpy as np
import pytest
from conftest import ROOT, read_h5
from PIL import Image

import data_rechunk
import export_onnx
from data_prepare import main
from dataloader_mtl import MTLDataset


@pytest.fixture
def own(tmp_path):
    """A function that writes images, masks and labels.csv to folders and returns them as options."""

    def make(count=10, mask=None, labels=None, size=(40, 30)):
        folders = tmp_path / 'images', tmp_path / 'masks'
        for number in range(count):
            for folder in folders:
                (folder / 'a').mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(number).integers(0, 256, (*size[::-1], 3), np.uint8)
            Image.fromarray(pixels).save(folders[0] / 'a' / f'{number}.png')
            if mask:
                mask(number).save(folders[1] / 'a' / f'{number}.png')
        if labels is not None:
            (tmp_path / 'labels.csv').write_text(labels)
        options = ['--images', folders[0], *(['--masks', folders[1]] if mask else [])]
        return options + (['--labels', tmp_path / 'labels.csv'] if labels is not None else [])

    return make


def prepare(options, out, *more):
    main([*map(str, options), '--out', str(out), '--size', '64', '--split', '60-20-20', *more])


def read_all(out, stem):
    """The values of a file of all splits, in the order of names."""
    names = np.concatenate([read_h5(out / split / 'names.h5') for split in ('train', 'val', 'test')])
    values = np.concatenate([read_h5(out / split / f'{stem}.h5') for split in ('train', 'val', 'test')])
    return dict(zip([name.decode() for name in names], values))


def mask_of(mode, background, pet, border=None):
    """A function that makes the mask number n, its left half pet."""

    def make(number):
        values = np.full((30, 40), background, np.uint8)
        values[:, :20] = pet
        if border is not None:
            values[:, 20:22] = border
        if mode == '1':
            return Image.fromarray(values > 0)
        image = Image.fromarray(values)
        if mode == 'P':
            image.putpalette(bytes(range(256)) * 3)
        return image if mode in ('L', 'P') else image.convert(mode)

    return make


@pytest.mark.parametrize(
    'mask, border',
    [
        (mask_of('L', 0, 1), 1),
        (mask_of('L', 0, 255), 1),
        (mask_of('1', 0, 1), 1),
        (mask_of('P', 0, 1, 255), 255),
        (mask_of('RGB', 0, 255), 1),
        (mask_of('L', 2, 1, 3), 1),
    ],
)
def test_masks_of_all_usual_kinds(own, tmp_path, mask, border):
    prepare(own(mask=mask), tmp_path / 'out')
    for values in read_all(tmp_path / 'out', 'masks').values():
        assert (values[:, :30] == 1).all() and (values[:, 37:] == 0).all()
        assert border == 1 or (values[:, 33:34] == 255).all()


def test_labels_are_those_of_the_csv_and_what_is_missing_is_unknown(own, tmp_path, capsys):
    labels = (
        '\ufeffImage,Class,xmin,ymin,xmax,ymax,note\na/0.png,pear,10,15,20,30,x\na/1,apple,,,,,\n\na/2.png,,0,0,40,30,\n'
        'gone.png,pear,,,,,\n'
    )
    options = own(labels=labels)
    prepare(options, tmp_path / 'out')
    output = capsys.readouterr().out
    assert 'labels.csv: columns that are not used: note' in output
    assert 'labels.csv: labels without an image: 1 (gone)' in output
    found = read_all(tmp_path / 'out', 'breeds')
    assert [found[f'a/{number}'].item() for number in range(4)] == [1, 0, -1, -1]
    boxes = read_all(tmp_path / 'out', 'bboxes')
    assert boxes['a/0'].tolist() == [16, 32, 32, 64] and boxes['a/2'].tolist() == [0, 0, 64, 64]
    assert np.isnan(boxes['a/1']).all() and (read_all(tmp_path / 'out', 'binary')['a/0'] == -1).all()
    data_rechunk.main(['--data', str(tmp_path / 'out')])
    split = MTLDataset('train', root=tmp_path / 'out').split
    assert split.class_names == ['apple', 'pear'] and split.class_species == [None, None]


def test_a_species_without_a_class_is_the_class(own, tmp_path):
    prepare(own(labels='image,species\na/0,Cat\na/1,dog\n'), tmp_path / 'out')
    found = read_all(tmp_path / 'out', 'breeds')
    assert [found[f'a/{number}'].item() for number in range(3)] == [0, 1, -1]


def test_masks_that_do_not_fit_are_named_and_unknown(own, tmp_path, capsys):
    options = own(mask=mask_of('L', 0, 1))
    Image.new('L', (30, 40), 1).save(tmp_path / 'masks' / 'a' / '0.png')
    (tmp_path / 'masks' / 'a' / '1.png').write_text('no image')
    Image.effect_noise((40, 30), 9).convert('RGB').point(lambda value: value % 7).save(
        tmp_path / 'masks' / 'a' / '2.png'
    )
    colours = np.zeros((30, 40, 3), np.uint8)
    colours[..., 0] = 255
    Image.fromarray(colours).save(tmp_path / 'masks' / 'a' / '2.png')
    Image.new('L', (40, 30)).save(tmp_path / 'masks' / 'other.png')
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
        ('image,xmin\na/0,1\n', 'line 2: the box .* is not four numbers'),
        ('image;class\na/0;pear\n', 'each column once; save it with commas'),
        ('image,class\n0,pear\n', 'none of the 1 labels has the name of an image .0 and a/0.; it is the path below'),
    ],
)
def test_labels_that_cannot_be_told_are_one_line(own, tmp_path, error_line, labels, message):
    assert re.search(message, error_line(main, *own(labels=labels), '--out', tmp_path / 'out'))
    assert not (tmp_path / 'out').exists()


def test_masks_of_other_names_and_without_one_that_can_be_read_are_refused(own, tmp_path, error_line):
    options = own(count=1, mask=mask_of('L', 0, 1))
    (tmp_path / 'masks' / 'a' / '0.png').write_text('no image')
    assert 'masks: none of its masks can be used' in error_line(main, *options)
    (tmp_path / 'masks' / 'a' / '0.png').rename(tmp_path / 'masks' / 'a' / '0_mask.png')
    line = error_line(main, *options)
    assert 'none of the 1 masks has the name of an image (a/0_mask and a/0)' in line


def test_a_box_outside_its_image_is_named_and_unknown(own, tmp_path, capsys):
    prepare(own(labels='image,xmin,ymin,xmax,ymax\na/0,10,10,90,30\na/1,0,0,40.5,30\n'), tmp_path / 'out')
    assert 'box of a/0: [10.0, 10.0, 90.0, 30.0] reaches outside its image of 40 x 30' in capsys.readouterr().err
    boxes = read_all(tmp_path / 'out', 'bboxes')
    assert np.isnan(boxes['a/0']).all() and boxes['a/1'].tolist() == [0, 0, 64, 64]


def test_other_values_of_masks_are_listed(own, tmp_path, error_line):
    line = error_line(main, *own(mask=mask_of('L', 0, 7)), '--out', tmp_path / 'out')
    assert 'masks: holds the values 0 (0.png), 7 (0.png); masks are 0 and 1, 0 and 255, or trimaps' in line


def test_names_that_are_there_twice_and_folders_without_images_are_refused(own, tmp_path, error_line):
    options = own()
    Image.new('RGB', (9, 9)).save(tmp_path / 'images' / 'a' / '0.jpg')
    assert '0.png: has the same name as 0.jpg; rename one of them' in error_line(main, *options)
    (tmp_path / 'images' / 'a' / '0.jpg').unlink()
    assert 'gone.csv: no such file' in error_line(main, *options, '--labels', tmp_path / 'gone.csv')
    (tmp_path / 'empty').mkdir()
    assert 'empty: finds no file that ends in .jpg' in error_line(main, '--images', tmp_path / 'empty')


def test_the_commands_of_the_documentation_run(tmp_path, monkeypatch, capsys):
    """On twenty drawn images that are no pets; test_export_onnx.py has the export itself."""
    page = (ROOT / 'docs' / 'data.md').read_text()
    part = page[page.index('## Images and masks of your own') :]
    script, commands = re.search(r'```python\n(.*?)```.*?```\n(.*?)```', part, re.DOTALL).groups()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(export_onnx, 'export', lambda *_: 0.0)
    exec(script, {})
    for line in commands.splitlines():
        python, name, *arguments = shlex.split(line)
        assert python == 'python'
        importlib.import_module(name.removesuffix('.py')).main(arguments)
    assert 'mine.onnx: ' in capsys.readouterr().out and (tmp_path / 'mask.png').exists()
