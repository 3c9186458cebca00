"""The census at the start of a run: classes that agree, a table in the log, warnings, refusals."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.evaluator import Evaluator
from mmengine.hooks import Hook
from mmengine.runner import BaseLoop
from torch import nn

from ..registry import HOOKS, register
from .census import Report, place_of, shortened, take_census
from .checked import DataError, leaves, reason

MMSEG_IGNORES = 255  # datasets that do not say
HEADS = ('bbox_head', 'decode_head', 'head')
ADVICE = '. Correct the data, or skip this check: --no-census'


@register(HOOKS)
class CensusHook(Hook):
    """Counts what is in the datasets, before training, and refuses what cannot be trained on.

    - Image folders of validation and test get the class numbers of training.
    - Classes have the same numbers in all datasets.
    - The heads have enough outputs, and all parts ignore the same label.
    - The annotation file of a metric has the images that are evaluated.
    - The main process counts images, objects and classes (see `census`), and logs the table.

    Raises:
        DataError: The data cannot be trained on, or parts of the run disagree (in all processes).
    """

    priority = 'NORMAL'  # before the dry run

    def __init__(self) -> None:
        self.classes: Sequence[str] | None = None  # of the training, or of the checkpoint

    def after_load_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        meta = checkpoint.get('meta') or {}
        self.classes = (meta.get('dataset_meta') or {}).get('classes')

    def before_train(self, runner: Any) -> None:
        training = runner.train_dataloader.dataset
        self.classes = folder_classes(training)
        self._follow(runner, runner.val_loop, self.classes)
        outcome: list[Any] = [None]
        if is_main_process():
            start = time.monotonic()
            try:
                report = self._report(runner, training)
                outcome = [[text + ADVICE for text in report.problems]]
                seconds = time.monotonic() - start
                runner.logger.info('\n'.join([f'Census of the data ({seconds:.1f} s):',
                                              *report.lines]))  # fmt: skip
                for text in report.oddities:
                    runner.logger.warning(f'Data: {text}')
            except DataError as error:
                outcome = [[str(error)]]
            except Exception as error:  # of any dataset or metric; the other processes wait
                outcome = [[f'the data cannot be counted: {reason(error)}{ADVICE}']]
        broadcast_object_list(outcome)
        if outcome[0]:
            first, *others = outcome[0]
            more = f' (and {len(others)} more, see the log)' if others else ''
            if is_main_process():
                for text in others:
                    runner.logger.error(f'Data: {text}')
            raise DataError(first + more)

    def before_val(self, runner: Any) -> None:
        if not isinstance(runner._train_loop, BaseLoop):  # validation alone
            self._evaluate_alone(runner, runner.val_loop, 'val')

    def before_test(self, runner: Any) -> None:
        self._evaluate_alone(runner, runner.test_loop, 'test')

    def _evaluate_alone(self, runner: Any, loop: Any, split: str) -> None:
        self._follow(runner, loop, self.classes)
        datasets, metrics = {split: loop.dataloader.dataset}, loop.evaluator.metrics
        problems = [*few_outputs(datasets, runner.model), *different_ignored(datasets, {}, metrics)]
        wrong, oddities = compare_truth(split, loop)
        for text in oddities:
            runner.logger.warning(f'Data: {text}')
        for text in [*problems, *wrong]:
            raise DataError(f'{text} (skip this check: default_hooks.census=None)')

    def _follow(self, runner: Any, loop: Any, classes: Sequence[str] | None) -> None:
        """Gives the image folders of a loop these class numbers."""
        if loop is None or classes is None:
            return
        for leaf in follow(loop.dataloader.dataset, classes):
            loop.evaluator.dataset_meta = leaf.metainfo
            runner.visualizer.dataset_meta = leaf.metainfo
            runner.logger.info(
                f'{leaf.img_prefix} has {len(leaf.folder_to_idx)} of the {len(classes)} classes of '
                'training, and gets their numbers.'
            )

    def _report(self, runner: Any, training: Any) -> Report:
        datasets = {'train': training}
        metrics: Sequence[Any] = ()
        wrong: list[str] = []
        oddities: list[str] = []
        if runner.val_loop is not None:
            datasets['val'] = runner.val_loop.dataloader.dataset
            metrics = runner.val_loop.evaluator.metrics
            wrong, oddities = compare_truth('val', runner.val_loop)
        problems = [
            *moved_classes(datasets),
            *few_outputs(datasets, runner.model),
            *different_ignored(datasets, ignored_in_training(runner.model), metrics),
        ]
        report = take_census(datasets)
        report.problems[:] = [*problems, *report.problems, *wrong]
        report.oddities[:0] = oddities
        return report


# ----------------------------------------------------------------------------------------- classes
def folder_classes(dataset: Any) -> Sequence[str] | None:
    """The classes of a dataset that numbers folders; None for others."""
    found = [leaf.metainfo['classes'] for leaf in leaves(dataset) if hasattr(leaf, 'folder_to_idx')]
    return found[0] if found else None


def follow(dataset: Any, classes: Sequence[str] | None) -> list[Any]:
    """Gives the folders of mmpretrain's `CustomDataset` other class numbers.

    Args:
        dataset: Any dataset, wrappers included.
        classes: Names in the order of the numbers; None changes nothing.

    Returns:
        The datasets whose numbers changed.

    Raises:
        DataError: A dataset has a folder that is no class.
    """
    changed = []
    for leaf in leaves(dataset):
        folders = getattr(leaf, 'folder_to_idx', None)
        # Folders such as n01440764 have other names than their classes.
        if not folders or classes is None or set(leaf.metainfo['classes']) != set(folders):
            continue
        if tuple(leaf.metainfo['classes']) == tuple(classes):
            continue
        unknown = sorted(set(folders) - set(classes))
        if unknown:
            raise DataError(
                f'{leaf.img_prefix} has folders that are not a class of training: '
                f'{shortened(unknown)}; training has {shortened(list(classes))}'
            )
        leaf._metainfo['classes'] = tuple(classes)
        leaf._fully_initialized = False
        leaf.full_init()  # numbers by name, see compat.image_folders
        changed.append(leaf)
    return changed


# ------------------------------------------------------------------------------------------- parts
def moved_classes(datasets: dict[str, Any]) -> Iterator[str]:
    """Classes that have another number in a dataset than in the first one."""
    first: dict[str, int] = {}
    for split, whole in datasets.items():
        for leaf in leaves(whole):
            if getattr(leaf, 'return_classes', False):  # open vocabulary
                continue
            classes = list(getattr(leaf, 'metainfo', {}).get('classes') or ())
            numbers = {name: classes.index(name) for name in classes}
            first = first or numbers
            for name in (
                name for name in numbers if first.get(name, numbers[name]) != numbers[name]
            ):
                yield (
                    f'class {name!r} has number {numbers[name]} in {split} ({place_of(leaf)}), but '
                    f'{first[name]} in the first dataset of train: give all the same '
                    'metainfo.classes'
                )
                break


def few_outputs(datasets: dict[str, Any], model: nn.Module) -> Iterator[str]:
    """Heads that have fewer outputs than a dataset has classes."""
    heads = {
        name: module
        for name, module in model.named_modules()
        if last_word(name) in HEADS and is_number(module, 'num_classes')
    }
    for split, whole in datasets.items():
        for leaf in leaves(whole):
            info = getattr(leaf, 'metainfo', {})
            known = len(info.get('classes') or ())
            if getattr(leaf, 'return_classes', False) or 'thing_classes' in info:
                continue  # open vocabulary, panoptic
            for name, head in heads.items():
                if head.num_classes < known:
                    yield (
                        f'model.{name}.num_classes={head.num_classes}, but {split} has {known} '
                        'classes: set it to this in every head'
                    )


def ignored_in_training(model: nn.Module) -> dict[str, int]:
    """The labels that the heads of a segmentor ignore, by place."""
    return {
        f'model.{name}': module.ignore_index
        for name, module in model.named_modules()
        if last_word(name).endswith('_head')
        and is_number(module, 'num_classes')
        and is_number(module, 'ignore_index')
    }


def different_ignored(
    datasets: dict[str, Any], ignored: dict[str, int], metrics: Sequence[Any]
) -> Iterator[str]:
    """Metrics and datasets that ignore other labels than each other, or than other parts do.

    Args:
        datasets: By split; the last one is evaluated.
        ignored: What other parts ignore, by place.
        metrics: Of the evaluation.
    """
    ignored = dict(ignored)
    for metric in metrics:
        if is_number(metric, 'ignore_index'):
            place = f'{[*datasets][-1]}_evaluator ({type(metric).__name__})'
            ignored[place] = metric.ignore_index
    for split, whole in datasets.items():
        for leaf in leaves(whole):
            # The default in mmseg has no effect, as long as no mask has this label.
            if ignored and getattr(leaf, 'ignore_index', MMSEG_IGNORES) != MMSEG_IGNORES:
                ignored[f'{split}_dataloader.dataset'] = leaf.ignore_index
    if len(set(ignored.values())) > 1:
        found = ', '.join(f'{value} in {place}' for place, value in ignored.items())
        yield f'ignore_index differs: {found}; all must have the same'


def compare_truth(split: str, loop: Any) -> tuple[list[str], list[str]]:
    """Compares the annotation files of mmdet's metrics with the images that are evaluated.

    Not for evaluators that give each metric its part of the images (MultiDatasetsEvaluator).

    Returns:
        Problems and oddities: images that a file lacks, and further images of a file.
    """
    files = {
        metric._coco_api.annotation_file: metric._coco_api
        for metric in (loop.evaluator.metrics if type(loop.evaluator) is Evaluator else ())
        if hasattr(getattr(metric, '_coco_api', None), 'annotation_file')
        and not getattr(metric, 'format_only', False)
    }
    parts = list(leaves(loop.dataloader.dataset))
    problems: list[str] = []
    oddities: list[str] = []
    if not files or not all(hasattr(leaf, 'all_images') for leaf in parts):
        return problems, oddities
    loaded = {}
    for leaf in parts:
        for info in map(leaf.get_data_info, range(len(leaf))):
            loaded[info['img_id']] = os.path.basename(info['img_path'])
    objects = getattr(parts[0], 'cat_img_map', {})  # images of each object, by category
    for path, truth in files.items():
        place = f'{split}_evaluator.ann_file {path}'
        if not truth.anns:
            problems.append(f'{place} has no annotations: format_only=True writes predictions only')
            continue
        names = {id_: os.path.basename(i.get('file_name', '')) for id_, i in truth.imgs.items()}
        absent = [id_ for id_, name in loaded.items() if names.get(id_) not in (name, '')]
        if absent:
            problems.append(
                f'{place} has other images than {split}_dataloader: {len(absent):,} of '
                f'{len(loaded):,} are not in it, such as {loaded[absent[0]]} with id {absent[0]}'
            )
        elif len(names) > len(loaded):
            oddities.append(
                f'{place} has {len(names) - len(loaded):,} images that {split}_dataloader does not '
                'load: all their objects count as missed'
            )
        elif len(parts) == 1:
            own, others = ({k: v for k, v in d.items() if v} for d in (objects, truth.cat_img_map))
            if own != others:
                oddities.append(f'{place} has other objects than {parts[0].ann_file}')
    return problems, oddities


def last_word(name: str) -> str:
    """The last part of a module's name that is not a number: `bbox_head` of `bbox_head.0`."""
    words = [part for part in name.split('.') if not part.isdigit()]
    return words[-1] if words else ''


def is_number(module: Any, name: str) -> bool:
    """Whether an object has an attribute that is a number."""
    return isinstance(getattr(module, name, None), int)
