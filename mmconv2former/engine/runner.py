"""A crash-safe mmengine Runner. Workarounds for mmengine bugs live here and in `hooks.py`.

    runner_type = 'mmconv2former.ReliableRunner'    # in any config for mmengine's Runner

- A checkpoint is written completely or not at all; the previous one is kept until then.
- A resumed run continues as if it had not been interrupted: same order of samples, same
  augmentation, same random numbers in the network. A skipped validation is run first.
- The log kept in memory is bounded: mmengine copies all of it at each iteration.
- Settings that depend on the machine are filled in (`mmconv2former.engine.device_defaults`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import all_gather_object, broadcast_object_list, get_rank, master_only
from mmengine.evaluator import DumpResults
from mmengine.hooks import CheckpointHook, LoggerHook
from mmengine.logging import MMLogger
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.optim import OptimWrapper
from mmengine.runner import BaseLoop, EpochBasedTrainLoop, IterBasedTrainLoop, Runner
from mmengine.runner.loops import _InfiniteDataloaderIterator
from mmengine.visualization import Visualizer
from torch import nn
from torch.utils.data import DataLoader

from ..checkpoint.loading import check_model
from ..checkpoint.reading import CheckpointError, load_from_checked_file
from ..checkpoint.resumption import check_optimizer, check_resumable
from ..registry import RUNNERS, register
from ..text import PrintableError, printable
from .device_defaults import distributed_wrapper, keep_own_step, usable_loader, with_fused_step
from .drawing import is_drawing, spare_metrics
from .finite import check_weights, images_on_error
from .hooks import EPOCH_POSITION
from .lost_files import LostFiles
from .resuming import Settings, check_run, follow_config, settings_of
from .seeding import PositionedSampler, ResumedBatches, give_positions, skip_batches
from .stopping import StoppingHook, make_patient, say
from .work_dir import FolderLock, WorkDirError, checkpoints_of, lock_folder, partial_name, replace

# What damaged content causes in mmengine's `resume`.
DAMAGED = (
    ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError,
    ValueError,
)  # fmt: skip


locks_when_built: list[bool] = []  # see `locked_when_built`


@contextmanager
def locked_when_built(take_over: bool = False) -> Iterator[None]:
    """Runners that are built here lock their work dir at once, before they write anything in it.

    Others do when they train: only then do they differ from one that evaluates.
    """
    locks_when_built.append(take_over)
    try:
        yield
    finally:
        locks_when_built.pop()


class CheckpointNotSaved(PrintableError, OSError):
    """A checkpoint could not be written; earlier ones are unchanged."""


@register(RUNNERS)
class ReliableRunner(Runner):
    """A `Runner` whose runs can be killed at any moment, with the arguments of mmengine's.

    `resume` may also be 'auto': resumes from the newest readable checkpoint in the work dir; if
    there is none, starts from scratch.
    """

    _has_loaded: bool  # this and the next are mmengine's
    _resume: bool | str
    _has_initial_weights = False
    _checked: tuple[str, dict] | None = None  # name and content of the file, see `preflight`
    take_over = False  # whether to take the work dir from a living run
    _locks: dict[str, FolderLock | None] | None = None  # by folder
    _settings: Settings | None = None  # of the config, before the first checkpoint
    is_training = False  # within `train`
    _skipped_batches = 0  # of the current epoch, which the run before this one has used

    @property
    def run_seed(self) -> int:
        """The seed that all processes share."""
        has_rank_added = self._randomness_cfg.get('diff_rank_seed', False)
        return self.seed - get_rank() if has_rank_added else self.seed

    # ------------------------------------------------------------------------------------- files
    @cached_property
    def lost_files(self) -> LostFiles:
        """What this run could not write."""
        return LostFiles(lambda line: self.logger.warning(printable(line)))

    def setup_env(self, env_cfg: dict) -> None:
        """Sets up the environment as mmengine does; nothing is written in the work dir before."""
        super().setup_env(env_cfg)
        if locks_when_built:
            self.take_over = locks_when_built[-1]
            self.lock(self.work_dir)

    def build_logger(self, *args: Any, **kwargs: Any) -> MMLogger:
        logger = super().build_logger(*args, **kwargs)
        for handler in logger.handlers:
            self.lost_files.spare_log(handler)
        return logger

    def build_visualizer(self, visualizer: Visualizer | dict | None = None) -> Visualizer:
        built = super().build_visualizer(visualizer)
        for backend in built._vis_backends.values():
            self.lost_files.spare_backend(backend)
        return built

    def dump_config(self) -> None:
        with self.lost_files.spared(f'config in {self.work_dir}'):
            super().dump_config()

    # ------------------------------------------------------------------------------------- build
    @staticmethod
    def build_dataloader(
        dataloader: DataLoader | dict, seed: int | None = None, diff_rank_seed: bool = False
    ) -> DataLoader:
        """Builds a data loader as mmengine does, with checked samples that have their own seeds.

        Raises:
            DataError: The dataset cannot be read, or has no samples, or less than one batch.
        """
        if isinstance(dataloader, DataLoader):
            return dataloader
        dataloader = usable_loader(dataloader)
        if isinstance(dataloader.get('dataset'), dict):
            dataset = dict(type='mmconv2former.CheckedDataset', dataset=dataloader['dataset'])
            dataloader = {**dataloader, 'dataset': dataset}
        loader = Runner.build_dataloader(dataloader, seed, diff_rank_seed)
        if hasattr(loader.dataset, 'check_batches'):
            loader.dataset.check_batches(loader)
        make_patient(loader)
        if seed is not None:
            give_positions(loader, seed - get_rank() if diff_rank_seed else seed)
        return loader

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        """Wraps a model for several processes as mmengine does; see `distributed_wrapper`."""
        if self.distributed and not is_model_wrapper(model):
            find_unused = self.cfg.get('find_unused_parameters', False)
            model_wrapper_cfg = distributed_wrapper(model_wrapper_cfg, find_unused)
        return super().wrap_model(model_wrapper_cfg, model)

    def build_optim_wrapper(self, optim_wrapper: Any) -> OptimWrapper:
        """Builds it as mmengine does, with a fused step on CUDA; see `with_fused_step`."""
        if isinstance(optim_wrapper, dict):
            settings = with_fused_step(optim_wrapper, next(self.model.parameters()).device)
            if settings is not optim_wrapper:
                self.logger.info('The optimizer steps in fused kernels (optimizer.fused=True).')
            optim_wrapper = settings
        return super().build_optim_wrapper(optim_wrapper)

    def register_default_hooks(self, hooks: dict | None = None) -> None:
        """Registers mmengine's default hooks, two of them replaced by ours, and our own hooks."""
        hooks = dict(hooks or {})
        hooks.setdefault('checkpoint', dict(type='CheckpointHook', interval=1))
        hooks.setdefault('logger', dict(type='LoggerHook'))
        for name, cls in (('checkpoint', CheckpointHook), ('logger', LoggerHook)):
            hook = hooks[name]
            stock = (cls, cls.__name__, f'mmengine.{cls.__name__}')
            if isinstance(hook, dict) and hook['type'] in stock:
                hooks[name] = {**hook, 'type': f'mmconv2former.Reliable{cls.__name__}'}
        ours = {
            'seed': 'SeedHook',
            'log_length': 'LogLengthHook',
            'batch_images': 'BatchImagesHook',
            'finite_loss': 'FiniteLossHook',
            'census': 'CensusHook',
            'run_facts': 'RunFactsHook',
            'schedule': 'ScheduleHook',
            'dry_run': 'DryRunHook',
            'stopping': 'StoppingHook',
        }
        for name, type_ in ours.items():
            hooks.setdefault(name, dict(type=f'mmconv2former.{type_}'))
            if hooks[name] is None:  # turned off, as mmengine allows
                del hooks[name]
        super().register_default_hooks(hooks)

    def register_hook(self, hook: Any, priority: Any = None) -> None:
        """Registers a hook as mmengine does; one that draws cannot end an evaluation."""
        known = list(self._hooks)
        super().register_hook(hook, priority)
        for new in self._hooks:
            if new not in known and is_drawing(new):
                spare_metrics(new, self.lost_files)

    # --------------------------------------------------------------------------------------- run
    def train(self) -> nn.Module:
        """Trains as mmengine does, as the only run that writes in the work dir.

        Raises:
            WorkDirError: Another run does.
            Exception: Of training.
        """
        self.lock(self.work_dir)
        self.is_training = True
        try:
            with images_on_error(self):
                return super().train()
        finally:
            self.is_training = False
            for hook in self.hooks:
                if isinstance(hook, StoppingHook):
                    hook.restore()
            for lock in (self._locks or {}).values():
                if lock is not None:
                    lock.release()
            self._locks = None

    def lock(self, folder: str) -> None:
        """Makes this run the only one that writes in a folder, until the end of training.

        Raises:
            WorkDirError: See `lock_folder`.
        """
        self._locks = {} if self._locks is None else self._locks
        if folder not in self._locks:
            self._locks[folder] = lock_folder(folder, self.take_over, say)

    def call_hook(self, fn_name: str, **kwargs: Any) -> None:
        """Calls hooks as mmengine does, which counts the batches of a resumed epoch from 0.

        An evaluation does not end if its predictions cannot be written; see `LostFiles`.
        """
        if fn_name in ('before_train_iter', 'after_train_iter'):
            kwargs['batch_idx'] += self._skipped_batches
        if fn_name in ('before_val_epoch', 'before_test_epoch'):
            loop = self.val_loop if fn_name == 'before_val_epoch' else self.test_loop
            for metric in getattr(getattr(loop, 'evaluator', None), 'metrics', ()):
                if isinstance(metric, DumpResults):
                    self.lost_files.spare_dump(metric)
        super().call_hook(fn_name, **kwargs)
        if fn_name == 'after_train_epoch':
            self._skipped_batches = 0

    def val(self) -> dict:
        with images_on_error(self):
            metrics = super().val()
        self.lost_files.check()
        return metrics

    def test(self) -> dict:
        """Evaluates as mmengine does.

        Raises:
            FilesNotWritten: At the end, after the metrics are shown.
        """
        with images_on_error(self):
            metrics = super().test()
        self.lost_files.check()
        return metrics

    # ------------------------------------------------------------------------------------ resume
    def load_or_resume(self) -> None:
        """Loads or resumes, from the newest readable checkpoint if none is named.

        Raises:
            CheckpointError: See `mmconv2former.checkpoint`. If none is named: there are
                checkpoints, but none can be read.
        """
        if self._has_loaded or not (
            self._resume == 'auto' or (self._resume and not self._load_from)
        ):
            super().load_or_resume()
            return
        # All processes use the same checkpoint, even if a file system shows some of them fewer
        # files.
        found = [[str(path) for path in checkpoints_of(Path(self.work_dir))]]
        broadcast_object_list(found)
        for checkpoint in found[0]:
            problem = None
            try:
                self.resume(checkpoint)
            except CheckpointError as error:
                problem = str(error)
            problems = [text for text in all_gather_object(problem) if text is not None]
            if not problems:
                return
            if checkpoint == found[0][-1]:
                raise CheckpointError(problems[0])
            self.logger.warning(f'{problems[0].rstrip(".")}. Trying the previous checkpoint.')
        self.logger.info(f'No checkpoint in {self.work_dir}; starting from scratch.')
        self._resume = False
        super().load_or_resume()

    def resume(
        self,
        filename: str,
        resume_optimizer: bool = True,
        resume_param_scheduler: bool = True,
        map_location: str | Callable = 'default',
    ) -> None:
        """Resumes as mmengine does, the order of samples with it, by the settings of the config.

        Raises:
            CheckpointError: See `load_checkpoint`.
        """
        # A checkpoint that failed before this one may have changed both.
        self._settings = self._settings or settings_of(self)
        self.message_hub.runtime_info.pop(EPOCH_POSITION, None)
        try:
            super().resume(filename, resume_optimizer, resume_param_scheduler, map_location)
        except (CheckpointError, torch.cuda.OutOfMemoryError):
            raise
        except DAMAGED as error:
            words = ' '.join(str(error).split())
            raise CheckpointError(
                f'checkpoint {filename!r} cannot be resumed from: {type(error).__name__}: {words}'
            ) from error
        loop = self.train_loop
        has_positions = self._renew_dataloader()
        loader = loop.dataloader
        if isinstance(loop, EpochBasedTrainLoop):
            # The earlier epochs may have had another number of processes, and so may this one.
            done, length = self.message_hub.runtime_info.pop(EPOCH_POSITION, (0, 1))
            self._skipped_batches = done * len(loader) // length if loader.batch_sampler else 0
            skip_batches(loader, self._skipped_batches)
            loop._iter = loop.epoch * len(loader) + self._skipped_batches
        follow_config(self, self._settings)
        if isinstance(loop, IterBasedTrainLoop) and has_positions:
            is_told = hasattr(_InfiniteDataloaderIterator, 'skip_iter')
            loop.dataloader_iterator = ResumedBatches(
                loader, loop.iter, ignored_calls=0 if is_told else loop.iter
            )

    def _renew_dataloader(self) -> bool:
        """Builds the training's data loader again, for the same dataset.

        The checkpoint has set the seed of its run, and older mmengine may already have taken
        batches from the samplers, which cannot be rewound.

        Returns:
            Whether the samples have positions; see `give_positions`.
        """
        loader = self.train_loop.dataloader
        sampler = getattr(loader.batch_sampler, 'sampler', None)
        if not isinstance(sampler, PositionedSampler) or not isinstance(
            self._train_dataloader, dict
        ):
            return False
        settings = {**self._train_dataloader, 'dataset': NotCopied(loader.dataset)}
        settings.pop('num_batch_per_epoch', None)  # the dataset is cut already
        self.train_loop.dataloader = self.build_dataloader(settings, self.run_seed)
        return True

    # -------------------------------------------------------------------------------------- load
    def preflight(self, training: bool) -> None:
        """Reads and checks all weights of a run, so that bad ones fail before the data are loaded.

        Args:
            training: Whether `train` will follow, with initial weights; otherwise `val` or `test`.

        Raises:
            CheckpointError: Pretrained weights or `load_from` cannot be read, or do not fit.
            WorkDirError: Another run trains in the work dir.
        """
        if training:
            self.lock(self.work_dir)
            self._init_model_weights()
        if self._load_from and self._resume != 'auto':  # which may find another checkpoint
            content = self._read(self._load_from, strict=not training or bool(self._resume))
            self._checked = self._load_from, content

    def _init_model_weights(self) -> None:
        """Initialises the weights as mmengine does, unless `preflight` has already done so."""
        if not self._has_initial_weights:
            super()._init_model_weights()
        self._has_initial_weights = True

    def _read(self, filename: str, strict: bool) -> dict:
        """The content of a checkpoint that fits, with the tensors to load as `state_dict`."""
        content = load_from_checked_file(filename, 'cpu')
        if self._resume:
            check_resumable(content, filename)
        content['state_dict'] = check_model(unwrapped(self.model), content, filename, strict)
        return content

    def load_checkpoint(
        self, filename: str, map_location: str | Callable = 'cpu', **kwargs: Any
    ) -> dict:
        """Loads a checkpoint that fits; see `mmconv2former.checkpoint.loading.check_model`.

        `map_location` and mmengine's other arguments are ignored: tensors are read on the CPU.

        Raises:
            CheckpointError: It cannot be read, or does not fit; the model is then unchanged.
        """
        (name, content), self._checked = self._checked or (None, {}), None
        if name != filename:
            is_tuning = isinstance(self._train_loop, BaseLoop) and not self._resume
            content = self._read(filename, strict=not is_tuning)
        if self._resume and not isinstance(self.optim_wrapper, dict):
            check_optimizer(content['optimizer'], self.optim_wrapper, filename)
            keep_own_step(content['optimizer'], self.optim_wrapper)
        if self._resume and isinstance(self._train_loop, BaseLoop):
            check_run(self, content['meta'], filename)
        # Hooks may change it: EMAHook swaps the averaged weights with the others.
        self.call_hook('after_load_checkpoint', checkpoint=content)
        if self._resume and 'ema_state_dict' in content:
            content['state_dict'] = check_model(
                unwrapped(self.model), content, filename, strict=True
            )
        unwrapped(self.model).load_state_dict(content['state_dict'], strict=False)
        self._has_loaded = True
        return content

    # -------------------------------------------------------------------------------------- save
    @master_only
    def save_checkpoint(
        self,
        out_dir: str,
        filename: str,
        *args: Any,
        backend_args: dict | None = None,
        **kwargs: Any,
    ) -> None:
        """Saves as mmengine does, but completely or not at all.

        Raises:
            CheckpointNotSaved: The folder is not writable or the disk is full; earlier files are
                unchanged.
            NonFiniteError: Weights are NaN or infinite; earlier files are unchanged.
            WorkDirError: Another run took the folder, or it is gone.
        """
        lock = (self._locks or {}).get(out_dir)
        problem = lock.problem() if lock is not None else None
        if problem is not None:
            raise WorkDirError(
                f'iteration {self.iter}: {problem}; this run ends and saves nothing there'
            )
        check_weights(self)
        is_local = backend_args is None and kwargs.get('file_client_args') is None
        if not is_local or '://' in out_dir:  # storage that writes whole objects
            super().save_checkpoint(out_dir, filename, *args, backend_args=backend_args, **kwargs)
            return
        partial, path = Path(out_dir, partial_name()), Path(out_dir, filename)
        try:
            super().save_checkpoint(out_dir, partial.name, *args, **kwargs)
            replace(partial, path)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            partial.unlink(missing_ok=True)
            raise CheckpointNotSaved(f'cannot save {path}: {error}') from error


class NotCopied:
    """Holds a dataset among settings that mmengine deep-copies; the copy is the dataset itself."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __deepcopy__(self, memo: dict) -> Any:
        return self.dataset


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside wrappers for several processes or for augmentation at test time."""
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.get_submodule('module')
    return model
