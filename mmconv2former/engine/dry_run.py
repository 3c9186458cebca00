"""Runs once, before the first iteration, what a training run needs only hours later.

Evaluation, drawing and saving fail for reasons that training does not meet: annotations without a
field, a metric of another name, a palette that is too short, a full disk.
"""

from __future__ import annotations

import io
import logging
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dist import all_gather_object, is_main_process
from mmengine.evaluator import DumpResults, Evaluator
from mmengine.evaluator.metric import _to_cpu
from mmengine.hooks import CheckpointHook, EarlyStoppingHook, Hook
from torch import nn
from torch.amp import autocast
from torch.utils._pytree import tree_flatten

from ..checkpoint.loading import check_model
from ..checkpoint.reading import load_from_checked_file
from ..checkpoint.resumption import check_optimizer, check_resumable
from ..images import open_image
from ..registry import HOOKS, register
from .drawing import is_drawing
from .finite import image_paths
from .runner import unwrapped

FILE = '.dry_run.pth'  # in the work dir
LARGEST = 256  # of inputs: normalised ones are below 3, without a standard deviation below 256
SEARCHED = 500  # validation images whose size is looked up
ADVICE = 'Training would fail there later. Correct it, or skip the dry run: --no-dry-run'


class DryRunError(RuntimeError):
    """A part of the run that is needed later fails; the message names it."""


@register(HOOKS)
class DryRunHook(Hook):
    """Tries everything that a training run needs later, on two validation images.

    - The first and the last sample of the training data, as a batch that is ready for the network.
    - Two validation images of different sizes, if there are, in batches of `val_dataloader`:
      predictions, metrics, and with mmengine's own evaluator the metrics that `save_best` and other
      hooks ask for.
    - The drawing of a prediction, if drawing is on. Nothing is stored.
    - A checkpoint in the work dir, which is read back and removed.

    Detectors keep boxes of any score meanwhile, so that there is something to evaluate. Weights and
    random numbers stay as they are. With several processes all try, and all end if one fails.

    Raises:
        DryRunError: Something fails (when training starts).
        DataError, CheckpointError: A sample, or the checkpoint, cannot be used.
    """

    priority = 'LOW'  # before a validation that an interruption skipped

    def before_train(self, runner: Any) -> None:
        start = time.monotonic()
        found: list[str] = []
        with unchanged_random_numbers(), quiet(runner.logger):
            batches = attempt('training data', lambda: training_batches(runner.train_dataloader))
            scale = attempt('training data', lambda: largest_input(runner.model, batches))
            found.append('samples')
            if runner.val_loop is not None:
                loader = runner.val_loop.dataloader
                batches = attempt(
                    'validation data', lambda: in_batches(loader, two_images(loader.dataset))
                )
                found += attempt('validation', lambda: try_validation(runner, batches))
            if any(isinstance(hook, CheckpointHook) for hook in runner.hooks):
                found.append(attempt('checkpoint', lambda: try_checkpoint(runner)))
        if scale > LARGEST:
            runner.logger.warning(
                f'Data: images have values up to {scale:.0f} when they reach the network: mean and '
                'std of model.data_preprocessor must match the values as loaded (0 to 255)'
            )
        seconds = time.monotonic() - start
        runner.logger.info(f'Dry run passed in {seconds:.1f} s: {", ".join(found)}.')


def attempt(name: str, function: Callable[[], Any]) -> Any:
    """Calls a function in all processes; raises in all of them if it fails in one."""
    result, error, message = None, None, None
    try:
        result = function()
    except Exception as caught:  # of any library
        error, message = caught, explain(name, caught)
    messages = [text for text in all_gather_object(message) if text is not None]
    if error is not None and type(error).__module__.startswith('mmconv2former.'):
        raise error  # names the file or setting already
    if messages:
        raise DryRunError(messages[0]) from error
    return result


def explain(name: str, error: Exception) -> str:
    """What failed, why, and what to do, in one line."""
    words = ' '.join(str(error).split())
    return f'dry run, {name}: {type(error).__name__}: {words}. {ADVICE}'


# ------------------------------------------------------------------------------------------- data
def training_batches(loader: Any) -> list[Any]:
    """The first and the last sample, in batches as the loader makes them."""
    indices = sorted({0, len(loader.dataset) - 1})
    return in_batches(loader, indices)


def in_batches(loader: Any, indices: Sequence[int]) -> list[Any]:
    """Some samples in batches of the loader's size; of one, if it has several sizes."""
    size = getattr(loader.batch_sampler, 'batch_size', 1)
    size = size if isinstance(size, int) else 1
    return [
        loader.collate_fn([loader.dataset[index] for index in indices[start : start + size]])
        for start in range(0, len(indices), size)
    ]


def largest_input(model: nn.Module, batches: Sequence[Any]) -> float:
    """The largest value, without its sign, of images as they reach the network."""
    preprocess = getattr(unwrapped(model), 'data_preprocessor', None)
    if preprocess is None:
        return 0.0
    with torch.no_grad():
        inputs = tree_flatten([preprocess(batch, training=True) for batch in batches])[0]
    images = [x for x in inputs if isinstance(x, torch.Tensor) and x.dim() >= 4]
    return max((float(x.abs().max()) for x in images if x.numel()), default=0.0)


def two_images(dataset: Any) -> list[int]:
    """The first image and the next one of another size; the last if the first ones are alike."""
    last = len(dataset) - 1
    if last == 0 or not hasattr(dataset, 'get_data_info'):
        return sorted({0, last})
    first = image_size(dataset.get_data_info(0))
    for index in range(1, min(last, SEARCHED)):
        if image_size(dataset.get_data_info(index)) != first:
            return [0, index]
    return [0, last]


def image_size(info: Mapping[str, Any]) -> tuple[int, int] | None:
    """Width and height from the annotations or the file's header; None if neither has them."""
    if {'width', 'height'} <= info.keys():
        return info['width'], info['height']
    try:
        with open_image(info['img_path']) as image:
            return image.size
    except (KeyError, OSError):
        return None  # left to the pipeline


# -------------------------------------------------------------------------------------- validation
def try_validation(runner: Any, batches: Sequence[Any]) -> list[str]:
    """Predicts, evaluates and draws; returns what it did."""
    loop, model = runner.val_loop, runner.model
    metrics = loop.evaluator.metrics
    # Others, as mmdet's MultiDatasetsEvaluator, give each metric its part of the predictions.
    evaluates_all = type(loop.evaluator) is Evaluator
    predictions, drawn = 0, 0
    was_training = model.training
    model.eval()
    # CocoMetric without `ann_file` keeps the truth of the images that it evaluates first.
    attributes = [dict(vars(metric)) for metric in metrics]
    try:
        with torch.no_grad(), any_score(model), compiled_later():
            for batch in batches:
                try:
                    with autocast(next(model.parameters()).device.type, enabled=loop.fp16):
                        outputs = model.val_step(batch)
                    predictions += len(outputs)
                    loop.evaluator.process(data_samples=outputs, data_batch=batch)
                    drawn += draw(runner, batch, outputs)
                except Exception as error:  # of any library
                    images = ', '.join(image_paths(batch))
                    raise DryRunError(explain(f'validation of {images}', error)) from error
        scores = {}
        if evaluates_all:
            scores = dict(pair for metric in metrics for pair in evaluate(metric).items())
    finally:
        model.train(was_training)
        for metric, before in zip(metrics, attributes):
            vars(metric).clear()
            vars(metric).update(before)
            metric.results.clear()
    if evaluates_all:
        check_wanted(runner, scores)
    done = [f'{predictions} predictions', f'{len(scores)} metrics']
    return [*done, 'a drawing'] if drawn else done


def evaluate(metric: Any) -> dict[str, Any]:
    """The values of a metric for what it processed in this process alone."""
    if isinstance(metric, DumpResults):
        return {}
    values = metric.compute_metrics(_to_cpu(metric.results))
    return {f'{metric.prefix}/{key}' if metric.prefix else key: values[key] for key in values}


def check_wanted(runner: Any, scores: Mapping[str, Any]) -> None:
    """Checks that the metrics exist that hooks choose checkpoints by or stop by.

    Raises:
        DryRunError: One does not exist.
    """
    wanted = []
    for hook in runner.hooks:
        if isinstance(hook, CheckpointHook) and hook.save_best:
            wanted += [('default_hooks.checkpoint.save_best', key) for key in hook.key_indicators]
            for key, rule in zip(hook.key_indicators, hook.rules):
                name = next(iter(scores), '') if key == 'auto' else key
                if rule == 'less' and is_better_greater(name, hook):
                    raise DryRunError(
                        f"default_hooks.checkpoint.rule='less' would keep the worst {name} as the "
                        "best checkpoint: set rule='greater'"
                    )
        if isinstance(hook, EarlyStoppingHook):
            wanted.append(('EarlyStoppingHook.monitor', hook.monitor))
    is_stock = type(runner.val_loop).__module__.startswith('mmengine.')
    for setting, key in wanted:
        # Loops of other libraries may put names before a metric's own.
        has_prefix = not is_stock and any(key.endswith(f'/{name}') for name in scores)
        if key != 'auto' and key not in scores and not has_prefix:
            raise DryRunError(
                f'{setting}={key!r} is no metric of val_evaluator, which has {", ".join(scores)}'
            )


def is_better_greater(name: str, hook: CheckpointHook) -> bool:
    """Whether a word in a metric's name is of one that rises, as the mAP in `coco/bbox_mAP_50`."""
    words = '|'.join(map(re.escape, hook._default_greater_keys))
    return re.search(rf'(?<![A-Za-z])({words})', name) is not None


def draw(runner: Any, batch: Any, outputs: Any) -> bool:
    """Draws as the config's hooks do, without storing; returns whether they draw."""
    hooks = [
        hook
        for hook in runner.hooks
        if is_drawing(hook) and (getattr(hook, 'draw', False) or getattr(hook, 'enable', False))
    ]
    for hook in hooks:
        interval, backends = hook.interval, runner.visualizer._vis_backends
        hook.interval, runner.visualizer._vis_backends = 1, {}
        try:  # the method of the class, which raises; see `spare_metrics`
            type(hook).after_val_iter(hook, runner, 0, batch, outputs)
        finally:
            hook.interval, runner.visualizer._vis_backends = interval, backends
    return bool(hooks)


@contextmanager
def any_score(model: nn.Module) -> Iterator[None]:
    """Makes detectors keep boxes of any score; an untrained one would predict none."""
    found = [
        (settings, settings['score_thr'])
        for module in model.modules()
        for settings in with_threshold(getattr(module, 'test_cfg', None))
    ]
    for settings, _ in found:
        settings['score_thr'] = 0.0
    try:
        yield
    finally:
        for settings, threshold in found:
            settings['score_thr'] = threshold


def with_threshold(settings: Any) -> Iterator[dict[str, Any]]:
    """The dicts in a detector's `test_cfg` that have a `score_thr`."""
    if isinstance(settings, dict):
        if 'score_thr' in settings:
            yield settings
        for value in settings.values():
            yield from with_threshold(value)


# -------------------------------------------------------------------------------------- checkpoint
def try_checkpoint(runner: Any) -> str:
    """Writes a checkpoint as the hook will, reads and removes it."""
    hook = next(hook for hook in runner.hooks if isinstance(hook, CheckpointHook))
    path = Path(runner.work_dir, FILE)
    try:
        runner.save_checkpoint(
            runner.work_dir,
            FILE,
            save_optimizer=hook.save_optimizer,
            save_param_scheduler=hook.save_param_scheduler,
            by_epoch=hook.by_epoch,
        )
        if not is_main_process():
            return 'a checkpoint'
        content = load_from_checked_file(str(path), 'cpu')
        check_model(unwrapped(runner.model), content, str(path), strict=True)
        if hook.save_optimizer and hook.save_param_scheduler:
            check_resumable(content, str(path))
        if hook.save_optimizer and not isinstance(runner.optim_wrapper, dict):
            check_optimizer(content['optimizer'], runner.optim_wrapper, str(path))
        return f'a checkpoint of {path.stat().st_size / 2**20:.0f} MiB'
    finally:
        if is_main_process():
            path.unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------- context
@contextmanager
def unchanged_random_numbers() -> Iterator[None]:
    """Restores the states of all random number generators."""
    states = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


@contextmanager
def quiet(logger: logging.Logger) -> Iterator[None]:
    """Hides tables of metrics, which mean nothing for two images."""
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def compiled_later() -> Iterator[None]:
    """Runs a compiled network without compilation, which takes minutes, if torch can do that."""
    set_stance = getattr(torch.compiler, 'set_stance', None)  # torch >= 2.6
    if set_stance is None:
        yield
    else:
        with set_stance('force_eager'):
            yield
