"""Hooks of `mmconv2former.engine.runner.ReliableRunner`."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from mmengine.fileio import LocalBackend
from mmengine.hooks import CheckpointHook, Hook, LoggerHook
from mmengine.runner import BaseLoop, EpochBasedTrainLoop

from ..registry import HOOKS, register
from .seeding import ITERATIONS, derived_seed, seed_all
from .work_dir import LAST_CHECKPOINT, partial_name, replace

SHORTEST_LOG = 10_000  # iterations; more than any average that is logged by default
# In the message hub: iteration of the last complete validation. Not named `val...`: mmengine would
# log it as a metric.
VALIDATED = 'last_validation'
# In the message hub, of a checkpoint between two ordinary ones: its iteration, until another is
# written; and in an epoch-based run the finished iterations of its epoch, and of how many.
STOPPED_AT = 'stopped_at'
EPOCH_POSITION = 'epoch_position'


@register(HOOKS)
class SeedHook(Hook):
    """Gives each iteration its own random numbers (drop path, dropout, sampled proposals)."""

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        is_of_rank = runner._randomness_cfg.get('diff_rank_seed', False)
        rank = runner.rank if is_of_rank else 0
        seed_all(derived_seed(runner.run_seed, ITERATIONS, runner.iter, rank))


@register(HOOKS)
class LogLengthHook(Hook):
    """Bounds the log that mmengine keeps of each scalar and copies at each iteration.

    Without a bound it grows to a million entries, is part of each checkpoint, and slows down each
    iteration. The bound is an epoch or `SHORTEST_LOG`, whichever is longer. It also limits longer
    averages, which `log_processor.custom_cfg` can request with `window_size='global'`.
    """

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        if self.every_n_train_iters(runner, SHORTEST_LOG // 100):
            length = max(SHORTEST_LOG, len(runner.train_dataloader))
            for buffer in runner.message_hub.log_scalars.values():
                buffer.max_length = length


@register(HOOKS)
class ReliableLoggerHook(LoggerHook):
    """mmengine's `LoggerHook`, but only the main process writes the metrics of a test.

    mmengine writes them to the same file from all processes at once. Their lines differ in length,
    so the end of a longer one can remain after a shorter one: invalid JSON.
    """

    def after_test_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        if is_main_process():
            with runner.lost_files.spared(f'metrics in {runner.log_dir}'):
                super().after_test_epoch(runner, metrics)


class LateRemoval:
    """A file backend that removes files only when asked to.

    Args:
        backend: mmengine's backend, which does everything else.
    """

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        self.outdated: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def remove(self, path: str) -> None:
        """Marks a file for removal."""
        self.outdated.append(path)

    def remove_outdated(self, kept: Collection[str | None]) -> None:
        """Removes the marked files that are not in `kept`."""
        for path in self.outdated:
            if path not in kept and self.backend.isfile(path):
                self.backend.remove(path)
        self.outdated.clear()


@register(HOOKS)
class ReliableCheckpointHook(CheckpointHook):
    """mmengine's `CheckpointHook`, except that a complete checkpoint exists at any moment.

    - A checkpoint is removed (`max_keep_ckpts`, the previous best) only after its successor is
      written.
    - `last_checkpoint` is replaced atomically.
    - If a run was interrupted between a checkpoint and the validation after it, the resumed run
      starts with that validation: its metrics are logged and the best checkpoint is kept.
    """

    file_backend: Any
    keep_ckpt_ids: list[int]  # mmengine has a `deque` there
    saved: int | None = None  # iteration of the newest checkpoint

    def before_train(self, runner: Any) -> None:
        super().before_train(runner)
        self.saved = runner.iter or None  # resumed from it
        if isinstance(self.file_backend, LocalBackend):
            runner.lock(str(self.out_dir))
        self.file_backend = LateRemoval(self.file_backend)
        if self.max_keep_ckpts > 0:  # the one of mmengine has no room for one more
            self.keep_ckpt_ids = list(self.keep_ckpt_ids)
        if validation_is_due(runner):
            runner.logger.info('Running the validation that the interruption skipped.')
            runner.val_loop.run()

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        if isinstance(runner._train_loop, BaseLoop):  # not in a standalone validation
            runner.message_hub.update_info(VALIDATED, runner.iter)
            super().after_val_epoch(runner, metrics)

    def _save_checkpoint_with_step(self, runner: Any, step: int, meta: dict) -> None:
        self._remove_outdated()  # the previous best, if there is a new one
        outdated = []
        if self.max_keep_ckpts > 0 and step not in self.keep_ckpt_ids:
            self.keep_ckpt_ids.append(step)
            # Includes those about to be removed: if this run is killed, the next removes them.
            runner.message_hub.update_info('keep_ckpt_ids', list(self.keep_ckpt_ids))
            outdated = self.keep_ckpt_ids[: -self.max_keep_ckpts]
            del self.keep_ckpt_ids[: -self.max_keep_ckpts]

        filename = self.filename_tmpl.format(step)
        self.last_ckpt = self.file_backend.join_path(self.out_dir, filename)
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)
        self._save(
            runner,
            filename,
            [*map(self.filename_tmpl.format, outdated), *names_between(runner)],
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
        )
        runner.message_hub.runtime_info.pop(STOPPED_AT, None)

    def save_between(self, runner: Any, iteration: int, epoch: int) -> None:
        """Saves a checkpoint between two ordinary ones, if this iteration has none yet.

        It does not count for `max_keep_ckpts`. The next checkpoint replaces it.

        Args:
            runner: The runner.
            iteration: Number of finished iterations.
            epoch: Number of finished epochs.
        """
        if self.saved == iteration:
            return
        outdated = names_between(runner)
        runner.message_hub.update_info(STOPPED_AT, iteration)
        meta = dict(epoch=epoch, iter=iteration)
        self._save(runner, name_between(iteration), outdated, meta=meta, by_epoch=False)

    def _save(
        self, runner: Any, name: str, outdated: list[str], meta: dict, **options: Any
    ) -> None:
        """Saves a checkpoint, remembers it as the last one, and then removes others."""
        runner.save_checkpoint(
            self.out_dir, name, meta=meta, backend_args=self.backend_args, **options, **self.args
        )
        self.saved = meta['iter']
        if is_main_process():
            partial = Path(runner.work_dir, partial_name())
            partial.write_text(self.file_backend.join_path(self.out_dir, name))
            replace(partial, Path(runner.work_dir, LAST_CHECKPOINT))
            for old in outdated:
                if old != name:
                    self.file_backend.remove(self.file_backend.join_path(self.out_dir, old))
            self._remove_outdated()

    def _save_best_checkpoint(self, runner: Any, metrics: dict[str, float]) -> None:
        super()._save_best_checkpoint(runner, metrics)
        self._remove_outdated()

    def _remove_outdated(self) -> None:
        """Removes what mmengine wanted to remove earlier; it stores the best in two places."""
        best_by_metric = getattr(self, 'best_ckpt_path_dict', {})
        best = [getattr(self, 'best_ckpt_path', None), *best_by_metric.values()]
        self.file_backend.remove_outdated(best)


def name_between(iteration: int) -> str:
    """File name of a checkpoint between two ordinary ones."""
    return f'iter_{iteration}.pth'


def names_between(runner: Any) -> list[str]:
    """The checkpoint between two ordinary ones that the next one replaces, if there is one."""
    stopped = runner.message_hub.runtime_info.get(STOPPED_AT)
    return [] if stopped is None else [name_between(stopped)]


def validation_is_due(runner: Any) -> bool:
    """Whether a resumed run is at a validation of its loop that has not run yet."""
    loop = runner.train_loop
    has_validated = runner.message_hub.runtime_info.get(VALIDATED) == loop.iter
    if runner.val_loop is None or loop.iter == 0 or has_validated:
        return False
    loop._decide_current_val_interval()
    counts_epochs = isinstance(loop, EpochBasedTrainLoop)
    if counts_epochs and loop.iter != loop.epoch * len(loop.dataloader):
        return False  # within an epoch
    done, last = (loop.epoch, loop.max_epochs) if counts_epochs else (loop.iter, loop.max_iters)
    return done >= loop.val_begin and (done % loop.val_interval == 0 or done == last)
