"""Hooks of `mmconv2former.engine.runner.ReliableRunner`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from mmengine.hooks import CheckpointHook, Hook, LoggerHook
from mmengine.runner import BaseLoop, EpochBasedTrainLoop

from ..registry import HOOKS, register
from .runner import LAST_CHECKPOINT, PARTIAL, replace
from .seeding import ITERATIONS, derived_seed, seed_all

SHORTEST_LOG = 10_000  # iterations; more than any average that is logged by default
# In the message hub: the iteration at which the last validation ended. mmengine logs what begins
# with `val` there with the metrics.
VALIDATED = 'last_validation'


@register(HOOKS)
class SeedHook(Hook):
    """Gives each iteration random numbers (drop path, dropout, sampled proposals) of its own."""

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        is_of_rank = runner._randomness_cfg.get('diff_rank_seed', False)
        rank = runner.rank if is_of_rank else 0
        seed_all(derived_seed(runner.run_seed, ITERATIONS, runner.iter, rank))


@register(HOOKS)
class LogLengthHook(Hook):
    """Bounds the log that mmengine keeps of each scalar, and copies at each iteration.

    Without it a log grows to a million entries, is a part of each checkpoint, and costs more time
    at each iteration. Averages over more iterations than an epoch or `SHORTEST_LOG`, which can be
    asked for by `log_processor.custom_cfg` with `window_size='global'`, are of that length.
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
    """mmengine's `LoggerHook`, of which one process alone writes the metrics of a test.

    mmengine's writes them to the same file from all processes at once. Their times differ in
    length, so that the end of a longer line can stay behind a shorter one: no JSON any more.
    """

    def after_test_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        if is_main_process():
            super().after_test_epoch(runner, metrics)


@register(HOOKS)
class ReliableCheckpointHook(CheckpointHook):
    """mmengine's `CheckpointHook`, which at no moment is without a whole checkpoint.

    - A checkpoint is removed (`max_keep_ckpts`, the former best) when its successor is on the disk,
      not before.
    - `last_checkpoint` is replaced as a whole.
    - When a resumed run was interrupted between a checkpoint and the validation that was due, the
      validation is made up for: its metrics are logged and the best checkpoint is kept, as in a run
      without interruption.
    """

    keep_ckpt_ids: list[int]  # mmengine has a `deque` there

    def before_train(self, runner: Any) -> None:
        super().before_train(runner)
        self._outdated_best: dict[str, str | None] = {}
        if self.max_keep_ckpts > 0:  # mmengine's has no room for one more
            self.keep_ckpt_ids = list(self.keep_ckpt_ids)
        if validation_is_due(runner):
            runner.logger.info('The validation that is due at this checkpoint is made up for.')
            runner.val_loop.run()

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        if isinstance(runner._train_loop, BaseLoop):  # else this is no part of a training
            runner.message_hub.update_info(VALIDATED, runner.iter)
            super().after_val_epoch(runner, metrics)

    def _save_checkpoint_with_step(self, runner: Any, step: int, meta: dict) -> None:
        self._remove_outdated_best()  # by now the new best is on the disk, if this follows it
        outdated = []
        if self.max_keep_ckpts > 0 and step not in self.keep_ckpt_ids:
            self.keep_ckpt_ids.append(step)
            # With those about to be removed, which a run that is killed before will remove later.
            runner.message_hub.update_info('keep_ckpt_ids', list(self.keep_ckpt_ids))
            outdated = self.keep_ckpt_ids[: -self.max_keep_ckpts]
            del self.keep_ckpt_ids[: -self.max_keep_ckpts]

        filename = self.filename_tmpl.format(step)
        self.last_ckpt = self.file_backend.join_path(self.out_dir, filename)
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)
        runner.save_checkpoint(
            self.out_dir,
            filename,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
            **self.args,
        )
        if not is_main_process():
            return
        partial = Path(runner.work_dir, PARTIAL)
        partial.write_text(self.last_ckpt)
        replace(partial, Path(runner.work_dir, LAST_CHECKPOINT))
        for old in outdated:
            self._remove(self.file_backend.join_path(self.out_dir, self.filename_tmpl.format(old)))

    def _save_best_checkpoint(self, runner: Any, metrics: dict[str, float]) -> None:
        former = self._best_checkpoints
        self._outdated_best = former
        self._best_checkpoints = dict.fromkeys(former)  # mmengine's would remove them first
        super()._save_best_checkpoint(runner, metrics)
        self._remove_outdated_best()
        current = self._best_checkpoints
        self._best_checkpoints = {key: current[key] or former[key] for key in former}

    @property
    def _best_checkpoints(self) -> dict[str, str | None]:
        """Path of the best checkpoint by metric; mmengine has two places for it."""
        if not self.save_best:
            return {}
        if len(self.key_indicators) == 1:
            return {'': self.best_ckpt_path}
        return dict(self.best_ckpt_path_dict)

    @_best_checkpoints.setter
    def _best_checkpoints(self, paths: dict[str, str | None]) -> None:
        if '' in paths:
            self.best_ckpt_path = paths['']
        elif paths:
            self.best_ckpt_path_dict = paths

    def _remove_outdated_best(self) -> None:
        current = self._best_checkpoints
        for key, path in self._outdated_best.items():
            if path is not None and current[key] not in (None, path):
                self._remove(path)
        self._outdated_best = {}

    def _remove(self, path: str) -> None:
        if is_main_process() and self.file_backend.isfile(path):
            self.file_backend.remove(path)


def validation_is_due(runner: Any) -> bool:
    """Whether a resumed run stands where its loop validates, and has not done so before."""
    loop = runner.train_loop
    has_validated = runner.message_hub.runtime_info.get(VALIDATED) == loop.iter
    if runner.val_loop is None or loop.iter == 0 or has_validated:
        return False
    loop._decide_current_val_interval()
    counts_epochs = isinstance(loop, EpochBasedTrainLoop)
    done, last = (loop.epoch, loop.max_epochs) if counts_epochs else (loop.iter, loop.max_iters)
    return done >= loop.val_begin and (done % loop.val_interval == 0 or done == last)
