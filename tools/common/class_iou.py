"""mmseg's `IoUMetric` with the IoU of each class among its metrics, instead of in the log only."""

from __future__ import annotations

from mmengine.registry import METRICS
from mmseg.evaluation import IoUMetric


@METRICS.register_module()
class ClassIoUMetric(IoUMetric):
    """Adds `IoU/CLASS` in percent for each class; NaN for a class that does not occur."""

    def compute_metrics(self, results: list) -> dict[str, float]:
        metrics = super().compute_metrics(results)
        intersections, unions, *_ = (sum(areas) for areas in zip(*results))
        ious = (100 * intersections / unions).tolist()
        names = self.dataset_meta['classes']
        return {**metrics, **{f'IoU/{name}': round(iou, 2) for name, iou in zip(names, ious)}}
