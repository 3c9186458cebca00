"""Datasets whose samples are checked: what is wrong with a file is said with the file's name.

mmdet, mmseg and mmpretrain raise what OpenCV, NumPy or pycocotools raised, mostly without a file,
and some faults they do not see at all: labels of another size than their image, labels of no class,
an annotation file without some of the classes (by which all labels behind it move). What they
handle, such as boxes thinner than a pixel or images without objects, stays as it is there.
docs/reliability.md lists both.

A `CheckedDataset` stands around any dataset. Checks that need the files of a sample are in
`CheckedPipeline`, the place which knows what is loaded: a dataset may load another sample than the
one asked for, when an augmentation fails, and wrappers load several.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from mmengine.dataset import Compose
from mmengine.registry import DATASETS as ROOT_DATASETS
from PIL import ExifTags, Image

from ..engine.seeding import SampleIndex, seed_all
from ..registry import DATASETS, register

# Modes of Pillow for one channel of at most 8 bits, to which mmseg casts labels without a word.
LABEL_MODES = ('L', 'P', '1')
# Of `mmcv.imread`: only so are images turned as their EXIF data say.
TURNING_COLOR_TYPES = ('color', 'grayscale')
UNTURNING_BACKENDS = ('turbojpeg', 'tifffile')
END_OF_JPEG = b'\xff\xd9'
TAIL = 1024  # bytes; some cameras write a little behind the end


class DataError(RuntimeError):
    """A file of a dataset cannot be used; the message names it."""

    def __init__(self, message: str) -> None:
        # torch rebuilds an exception of a data worker from the text of its whole trace.
        super().__init__(message.rpartition(f'{type(self).__name__}: ')[2].rstrip())


@register(DATASETS)
class CheckedDataset:
    """Any dataset, with checks of its files; everything else is the other's.

    Args:
        dataset: Config of the dataset.

    Raises:
        DataError: The dataset cannot be read, or nothing of it is left for training. Reading a
            sample raises it too.
    """

    def __init__(self, dataset: dict) -> None:
        try:
            self.dataset = ROOT_DATASETS.build(dataset)
            if hasattr(self.dataset, 'full_init'):
                self.dataset.full_init()
            is_empty = len(self.dataset) == 0
        except Exception as error:  # of any library: raised again, with a name
            # NumPy's words for a dataset of mmengine without samples.
            is_empty = 'need at least one array to concatenate' in str(error)
            if not is_empty:
                raise DataError(f'{describe(dataset)} cannot be read: {reason(error)}') from error
        if is_empty:
            raise DataError(
                f'{describe(dataset)} has no sample to use: no images, or none with objects of the '
                'classes (filter_cfg)'
            )
        for leaf in leaves(self.dataset):
            check_categories(leaf)
            if hasattr(leaf, 'pipeline'):
                leaf.pipeline = CheckedPipeline(leaf.pipeline, leaf)

    def __getitem__(self, index: int) -> Any:
        if isinstance(index, SampleIndex):
            seed_all(index.seed)
        try:
            return self.dataset[int(index)]
        except DataError:
            raise
        except Exception as error:  # of a pipeline around several datasets, or of no pipeline
            name = type(self.dataset).__name__
            raise DataError(f'sample {int(index)} of {name}: {reason(error)}') from error

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        if name == 'dataset':  # not there yet, while this object is being copied
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets an attribute of the other dataset, such as the pipeline that a hook exchanges."""
        if name == 'dataset':
            super().__setattr__(name, value)
        elif name == 'pipeline':
            self.dataset.pipeline = CheckedPipeline(value, self.dataset)
        else:
            setattr(self.dataset, name, value)


class CheckedPipeline(Compose):
    """A dataset's pipeline, with checks of what goes in and what comes out.

    Args:
        pipeline: The pipeline; its transforms are shared.
        dataset: Of which it is; says which labels there are.
    """

    def __init__(self, pipeline: Callable, dataset: Any) -> None:
        super().__init__(getattr(pipeline, 'transforms', [pipeline]))
        # mmseg's datasets have both; values of other labels, such as panoptic, are not looked at.
        self.num_classes = len(getattr(dataset, 'metainfo', {}).get('classes') or ())
        self.ignore_index = getattr(dataset, 'ignore_index', None)
        self.has_class_labels = self.num_classes > 0 and self.ignore_index is not None
        self.turns_images = turns_images(self.transforms)

    def __call__(self, data: dict) -> dict | None:
        image, labels = data.get('img_path'), data.get('seg_map_path')
        try:
            check_files(
                image,
                labels,
                (data.get('width'), data.get('height')),
                labels_are_classes=self.has_class_labels,
                is_turned=self.turns_images,
            )
            check_boxes(data.get('instances') or ())
            result = super().__call__(data)
            for sample in samples_of(result):
                self._check_sample(sample)
        except Exception as error:  # of any transform: raised again, with the names of the files
            files = f'image {image}' + (f' with labels {labels}' if labels else '')
            raise DataError(f'{files}: {reason(error)}') from error
        return result

    def _check_sample(self, sample: Any) -> None:
        labels = sample.get('gt_sem_seg')
        if labels is not None and self.has_class_labels:
            labels = labels.data
            wrong = labels[(labels >= self.num_classes) & (labels != self.ignore_index)]
            if len(wrong):
                raise ValueError(
                    f'labels {wrong.unique().tolist()[:5]} are of no class: there are 0 to '
                    f'{self.num_classes - 1}, and {self.ignore_index} for what does not count, '
                    'after what the pipeline does to the values of the file (reduce_zero_label)'
                )


def check_files(
    image: Any,
    labels: Any,
    annotated_size: tuple[int | None, int | None] = (None, None),
    *,
    labels_are_classes: bool = True,
    is_turned: bool = True,
) -> None:
    """Looks at files before they are decoded: at their headers and at the end of the image.

    What is not a path of this machine, or not readable, is left to the pipeline.

    Args:
        image: Path of an image.
        labels: Path of its semantic or panoptic labels, or None.
        annotated_size: Width and height that the annotations give, if they do.
        labels_are_classes: Whether a value of the labels is a class. Panoptic labels number the
            segments, in three channels.
        is_turned: Whether the image will be turned as its EXIF data say; see `turns_images`.

    Raises:
        ValueError: The image is cut off or of another size than annotated, or the labels have
            another size than the image, or are classes and not of one channel with 8 bits.
    """
    if not isinstance(image, (str, os.PathLike)) or '://' in str(image):
        return
    try:
        size = size_as_loaded(image, is_turned)
        if None not in annotated_size and size != annotated_size:
            raise ValueError(f'has {text(size)} pixels, {text(annotated_size)} are annotated')
        if labels is None:
            return
        with Image.open(labels) as picture:
            label_size, mode = picture.size, picture.mode
    # Not there, not an image, of a format that only others know, or larger than Pillow likes.
    except (OSError, Image.DecompressionBombError):
        return
    if labels_are_classes and mode not in LABEL_MODES:
        raise ValueError(
            f'labels must be a picture of one channel with 8 bits, got mode {mode!r} of Pillow'
        )
    if label_size != size:
        raise ValueError(f'labels of {text(label_size)} pixels for an image of {text(size)}')
    if labels_are_classes and 1 in label_size:  # mmseg squeezes them
        raise ValueError(f'labels must have two pixels a side or more, got {text(label_size)}')


def text(size: tuple[int | None, int | None]) -> str:
    """A width and height for a message."""
    return f'{size[0]}x{size[1]}'


def turns_images(transforms: Iterable) -> bool:
    """Whether what loads the images turns them as their EXIF data say, as mmcv does by default."""
    # Loaders of labels have a backend too, but no type of colour.
    loader = next((item for item in transforms if hasattr(item, 'color_type')), None)
    backend = getattr(loader, 'imdecode_backend', 'cv2')
    return (
        getattr(loader, 'color_type', 'color') in TURNING_COLOR_TYPES
        and backend not in UNTURNING_BACKENDS
    )


def size_as_loaded(image: str | os.PathLike, is_turned: bool = True) -> tuple[int, int]:
    """Width and height of an image as it is loaded.

    Args:
        image: Path of an image.
        is_turned: Whether it is turned as its EXIF data say, as OpenCV does.

    Raises:
        ValueError: It is a JPEG file that is cut off. OpenCV before 4.12 fills the rest with grey.
        OSError: It cannot be read.
    """
    with Image.open(image) as picture:
        if picture.format == 'JPEG' and not ends_as_jpeg(image):
            try:
                picture.load()
            except OSError as error:
                raise ValueError(f'the file is cut off or broken: {error}') from error
        width, height = picture.size
        # Asking another format than JPEG for EXIF data that it has not would decode the picture.
        has_exif = is_turned and 'exif' in picture.info
        is_on_its_side = has_exif and picture.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    return (height, width) if is_on_its_side else (width, height)


def ends_as_jpeg(path: str | os.PathLike) -> bool:
    """Whether the end of a file holds a JPEG's end; without it the file may be whole or not."""
    with open(path, 'rb') as file:
        file.seek(-min(TAIL, os.path.getsize(path)), os.SEEK_END)
        return END_OF_JPEG in file.read()


def check_boxes(instances: Iterable[Mapping]) -> None:
    """Checks the boxes of an image, as annotated.

    Raises:
        ValueError: One has a number that is NaN or infinite.
    """
    for instance in instances:
        box = instance.get('bbox', ())
        if not all(map(math.isfinite, box)):
            raise ValueError(f'box {list(box)} is not of finite numbers')


def check_categories(dataset: Any) -> None:
    """Checks that an annotation file in COCO's format has all classes of its dataset.

    mmdet numbers the classes that it finds, so that one that is missing moves all others.

    Raises:
        DataError: Classes are missing.
    """
    category_ids = getattr(dataset, 'cat_ids', None)
    classes = getattr(dataset, 'metainfo', {}).get('classes') or ()
    if category_ids is not None and len(category_ids) != len(classes):
        raise DataError(
            f'{dataset.ann_file} has {len(category_ids)} of the {len(classes)} classes of '
            f'{type(dataset).__name__} among its categories: give those that it has as '
            'dataset.metainfo.classes, or correct the file (tools/prepare_data.py names them)'
        )


def leaves(dataset: Any) -> Iterator[Any]:
    """The datasets inside wrappers of several or of one."""
    inner = getattr(dataset, 'datasets', None) or [getattr(dataset, 'dataset', None)]
    if inner == [None]:
        yield dataset
    else:
        for other in inner:
            yield from leaves(other)


def samples_of(result: Any) -> list:
    """What a pipeline has packed: one sample, or at test time one for each augmentation."""
    samples = result.get('data_samples') if isinstance(result, Mapping) else None
    if samples is None:
        return []
    return samples if isinstance(samples, list) else [samples]


def describe(settings: Mapping) -> str:
    """The type of a dataset and the files it is made from, by its config."""
    prefixes = settings.get('data_prefix') or {}
    folders = list(prefixes.values()) if isinstance(prefixes, Mapping) else [prefixes]
    root = settings.get('data_root') or ''
    files = [settings['ann_file']] if settings.get('ann_file') else folders
    paths = ', '.join(os.path.join(root, file) for file in files) or root
    return f'dataset {settings.get("type")}' + (f' of {paths}' if paths else '')


def reason(error: Exception) -> str:
    """What an exception says, in one line, with its type unless it is one of ours."""
    words = ' '.join(str(error).split())
    return words if type(error) is ValueError else f'{type(error).__name__}: {words}'
