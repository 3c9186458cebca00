"""Datasets whose errors name the file, with checks for errors that would pass unnoticed.

mmdet, mmseg and mmpretrain pass on the errors of OpenCV, NumPy or pycocotools, mostly without a
file name. They do not notice truncated JPEG files, annotations or labels of another size than their
image, labels that are not a class, and annotation files that lack classes.

`CheckedDataset` wraps any dataset. `CheckedPipeline` replaces the pipeline of each dataset inside
it, because only the pipeline knows which sample is loaded: mmdet loads another one when an
augmentation fails, and wrappers load several. docs/tables/reliability.md lists the errors and their
messages.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from traceback import walk_tb
from typing import Any

import numpy as np
from mmengine.dataset import Compose
from mmengine.registry import DATASETS as ROOT_DATASETS
from torch.utils._pytree import tree_flatten
from torch.utils.data import DataLoader

from ..engine.seeding import SampleIndex, seed_all
from ..images import open_image
from ..registry import DATASETS, register
from ..text import PrintableError, one_line

LABEL_MODES = ('L', 'P', '1')  # of Pillow: one channel of at most 8 bits
START_OF_JPEG, END_OF_JPEG = b'\xff\xd8', b'\xff\xd9'
COCO_NAMES = {'mask': 'segmentation', 'bbox_label': 'category_id'}  # of mmdet's fields
OF_ANNOTATIONS = {'image_id', 'category_id', 'bbox'}
META = ('classes', 'palette')  # in a dataset's `metainfo`
TAIL = 1024  # bytes; some cameras append data to a JPEG


class DataError(PrintableError, RuntimeError):
    """A file of a dataset cannot be used; the message names it."""

    def __init__(self, message: str) -> None:
        # torch rebuilds the exception of a data worker from the text of its traceback.
        super().__init__(message.rpartition(f'{type(self).__name__}: ')[2].rstrip())


@register(DATASETS)
class CheckedDataset:
    """Wraps a dataset and checks its files; all other attributes are those of the dataset.

    Args:
        dataset: Config of the dataset.

    Raises:
        DataError: The dataset cannot be read or is empty, classes are missing, or (when indexed) a
            sample cannot be used.
    """

    def __init__(self, dataset: dict) -> None:
        try:
            self.dataset = ROOT_DATASETS.build(dataset)
            if hasattr(self.dataset, 'full_init'):
                self.dataset.full_init()
            is_empty = len(self.dataset) == 0
        except Exception as error:  # of any library
            # mmengine's BaseDataset without samples fails with this NumPy message.
            is_empty = 'need at least one array to concatenate' in str(error)
            if not is_empty:
                raise DataError(f'cannot read {describe(dataset)}: {reason(error)}') from error
        if is_empty:
            raise DataError(
                f'{describe(dataset)} is empty: no images, or none with objects of its classes '
                '(filter_cfg)'
            )
        for leaf in leaves(self.dataset):
            check_metainfo(leaf)
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
        except Exception as error:  # from a pipeline around several datasets, or without pipeline
            name = type(self.dataset).__name__
            raise DataError(f'sample {int(index)} of {name}: {reason(error)}') from error

    def check_batches(self, loader: DataLoader) -> None:
        """Checks that a loader of this dataset has a batch.

        Raises:
            DataError: It has none.
        """
        if len(loader) == 0:
            size = getattr(loader.batch_sampler, 'batch_size', 1)
            raise DataError(
                f'no batch of {size} can be made of {len(self)} samples (with drop_last, for each '
                'process): reduce batch_size, or set drop_last=False'
            )

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        if name == 'dataset':  # not set yet while this object is being copied
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets an attribute of the wrapped dataset, such as a pipeline that a hook replaces."""
        if name == 'dataset':
            super().__setattr__(name, value)
        elif name == 'pipeline':
            self.dataset.pipeline = CheckedPipeline(value, self.dataset)
        else:
            setattr(self.dataset, name, value)


class CheckedPipeline(Compose):
    """A pipeline that checks the files of a sample and the results of its transforms.

    Args:
        pipeline: The pipeline; its transforms are shared.
        dataset: The dataset it belongs to, which knows the classes.
    """

    def __init__(self, pipeline: Callable, dataset: Any) -> None:
        super().__init__(getattr(pipeline, 'transforms', [pipeline]))
        self.num_classes = len(getattr(dataset, 'metainfo', {}).get('classes') or ())
        self.ignore_index = getattr(dataset, 'ignore_index', None)
        # Only mmseg's datasets have both. Panoptic labels number segments, in three channels.
        self.has_class_labels = self.num_classes > 0 and self.ignore_index is not None
        self.casts_labels = self.has_class_labels and any(map(casts_labels, nested(self)))

    def __call__(self, data: dict) -> dict | None:
        image, labels = data.get('img_path'), data.get('seg_map_path')
        with naming(image, labels):
            check_jpeg(image)
            if self.casts_labels:
                check_label_mode(labels)
            check_boxes(data.get('instances') or ())
            known = set(data)
            for transform in self.transforms:
                data = transform(data)
                if data is None:  # the dataset tries another sample
                    return None
                if isinstance(data, Mapping):
                    check_sizes(data, data.keys() - known)
                    known = set(data)
            if self.has_class_labels:
                for sample in tree_flatten(data.get('data_samples'))[0]:
                    if 'gt_sem_seg' in (sample or ()):
                        self._check_classes(sample.gt_sem_seg.data.numpy())
        return data

    def load_labels(self, data: dict) -> np.ndarray | None:
        """The labels of a sample, (H, W), as the transform that loads them returns them.

        None if no transform loads labels.

        Raises:
            DataError: They cannot be read, or have values that are not a class.
        """
        with naming(data.get('img_path'), data.get('seg_map_path')):
            if self.casts_labels:
                check_label_mode(data.get('seg_map_path'))
            for transform in self.transforms:
                data = transform(data)
                if not isinstance(data, Mapping):
                    return None
                if 'gt_seg_map' in data:
                    check_sizes(data, {'gt_seg_map'})
                    self._check_classes(data['gt_seg_map'])
                    return data['gt_seg_map']
        return None

    def _check_classes(self, labels: np.ndarray) -> None:
        """Checks the values of labels."""
        wrong = labels[(labels >= self.num_classes) & (labels != self.ignore_index)]
        if len(wrong):
            raise ValueError(
                f'labels {np.unique(wrong).tolist()[:5]} are not a class (0 to '
                f'{self.num_classes - 1}) and not {self.ignore_index} (ignored); these values '
                'are those after the pipeline (reduce_zero_label)'
            )


@contextmanager
def naming(image: Any, labels: Any) -> Iterator[None]:
    """Turns any error into one that names the files of the sample."""
    try:
        yield
    except Exception as error:  # of any transform
        files = f'image {image}' + (f' with labels {labels}' if labels else '')
        raise DataError(f'{files}: {reason(error)}') from error


def nested(pipeline: Any) -> Iterator[Any]:
    """All transforms of a pipeline, also those inside others."""
    for name in ('transforms', 'subroutines'):  # the second one is TestTimeAug's
        for part in tree_flatten(getattr(pipeline, name, ()))[0]:
            yield part
            yield from nested(part)


def casts_labels(transform: Any) -> bool:
    """Whether a transform reads labels as mmseg's `LoadAnnotations` does, which casts to 8 bits."""
    reader = getattr(transform, '_load_seg_map', None)
    return getattr(reader, '__module__', '').startswith(('mmcv.', 'mmseg.'))


def check_jpeg(path: Any) -> None:
    """Checks that a local JPEG file is complete; OpenCV before 4.12 fills the rest with grey.

    Raises:
        ValueError: The file is truncated.
        OSError: It cannot be opened.
    """
    if not isinstance(path, (str, os.PathLike)) or not os.path.isfile(path):
        return  # left to the pipeline
    with open(path, 'rb') as file:
        if file.read(2) != START_OF_JPEG:
            return
        file.seek(max(0, os.path.getsize(path) - TAIL))
        if END_OF_JPEG in file.read():
            return
    try:  # complete files can have more than TAIL bytes appended
        with open_image(path) as image:
            image.load()
    except OSError as error:
        raise ValueError(f'the file is truncated or broken: {error}') from error


def check_label_mode(path: Any) -> None:
    """Checks that labels have one channel of 8 bits; mmseg's loader casts others silently.

    Raises:
        ValueError: The labels have another format.
    """
    try:
        with open_image(path) as labels:
            mode = labels.mode
    except (OSError, AttributeError):
        return  # no path, or a file that only the pipeline can read
    if mode not in LABEL_MODES:
        raise ValueError(
            f'labels must have one channel of 8 bits, got Pillow mode {mode!r}: convert them, or '
            'read them with a transform of your own instead of LoadAnnotations'
        )


def check_boxes(instances: Iterable[Mapping]) -> None:
    """Checks that annotated boxes are finite.

    Raises:
        ValueError: A box is not finite.
    """
    for instance in instances:
        box = instance.get('bbox', ())
        if not all(map(math.isfinite, box)):
            raise ValueError(f'box {list(box)} is not finite')


def check_sizes(data: Mapping, new: set[str]) -> None:
    """Checks the sizes of an image and its labels after loading.

    Args:
        data: What a transform returned.
        new: The keys that it added.

    Raises:
        ValueError: The image has another size than its annotations say, or the labels have another
            size than the image.
    """
    shape = data.get('ori_shape')  # (H, W) of the image as it was loaded
    if shape is None:
        return
    annotated = data.get('height'), data.get('width')
    if 'img' in new and None not in annotated and annotated != tuple(shape):
        raise ValueError(f'image has shape {shape}, annotations say {annotated}')
    if 'gt_seg_map' in new and np.shape(data['gt_seg_map']) != tuple(shape):
        raise ValueError(f'labels have shape {np.shape(data["gt_seg_map"])}, the image has {shape}')


def check_metainfo(dataset: Any) -> None:
    """Checks the names in `metainfo`; datasets ignore unknown ones, such as the old `CLASSES`.

    Raises:
        DataError: A name is almost one that datasets read.
    """
    for name in getattr(dataset, 'metainfo', None) or ():
        if name not in META and (near := get_close_matches(name.lower(), META, 1, cutoff=0.8)):
            raise DataError(
                f'metainfo of {type(dataset).__name__} has {name!r}, which has no effect: write '
                f'{near[0]!r}'
            )


def check_categories(dataset: Any) -> None:
    """Checks that a COCO annotation file has all classes of its dataset.

    mmdet numbers the classes that it finds, so a missing one shifts the labels after it.

    Raises:
        DataError: Classes are missing, or one is named twice.
    """
    category_ids = getattr(dataset, 'cat_ids', None)
    classes = getattr(dataset, 'metainfo', {}).get('classes') or ()
    twice = [name for name, number in Counter(classes).items() if number > 1]
    if category_ids is not None and twice:
        raise DataError(f'classes of {type(dataset).__name__} have {twice[0]!r} twice')
    if category_ids is not None and len(category_ids) != len(classes):
        raise DataError(
            f'{dataset.ann_file} has {len(category_ids)} of the {len(classes)} classes of '
            f'{type(dataset).__name__} in its categories: set dataset.metainfo.classes to the '
            'classes of the file, or correct the file (tools/prepare_data.py names them)'
        )


def leaves(dataset: Any) -> Iterator[Any]:
    """The datasets inside wrappers such as `ConcatDataset`, or their settings in a config."""
    inner = getattr(dataset, 'datasets', None) or [getattr(dataset, 'dataset', None)]
    if inner == [None]:
        yield dataset
    else:
        for other in inner:
            yield from leaves(other)


def describe(settings: Mapping) -> str:
    """Type and files of a dataset, from its config."""
    prefixes = settings.get('data_prefix') or {}
    folders = list(prefixes.values()) if isinstance(prefixes, Mapping) else [prefixes]
    root = settings.get('data_root') or ''
    files = [settings['ann_file']] if settings.get('ann_file') else folders
    paths = ', '.join(os.path.join(root, file) for file in files) or root
    return f'dataset {settings.get("type")}' + (f' ({paths})' if paths else '')


def reason(error: Exception) -> str:
    """The message of an exception on one line, with its type unless it is a plain ValueError.

    A missing key is called a missing field; annotation files cause such errors. The entry that
    lacks it is named by its `id` if it has one.
    """
    if type(error) is KeyError and len(error.args) == 1 and str(error.args[0]).isidentifier():
        field = str(error.args[0])
        name = f"'{field}'" + (f' (COCO: {COCO_NAMES[field]!r})' if field in COCO_NAMES else '')
        return f'KeyError: field {name} is missing{entry_without(field, error)}'
    words = one_line(str(error))
    return words if type(error) is ValueError else f'{type(error).__name__}: {words}'


def entry_without(field: str, error: Exception) -> str:
    """The entry of an annotation file that was being read when a field was missing."""
    frames = [frame for frame, _ in walk_tb(error.__traceback__)]
    values = list(frames[-1].f_locals.values()) if frames else []
    entries = [v for v in values if isinstance(v, dict) and 'id' in v and field not in v]
    entries.sort(key=lambda entry: bool(OF_ANNOTATIONS & entry.keys()))
    if not entries:
        return ''
    kind = 'annotation' if OF_ANNOTATIONS & entries[-1].keys() else 'entry'
    return f' in the {kind} with id {entries[-1]["id"]}'
