"""Test-time augmentation for instance segmentation: scales and flips, boxes and masks.

mmdet's `DetTTAModel` merges boxes only, and COCO's mask AP cannot be computed from its results.
Needs mmdet, so the package does not import it: recipes name this module in `custom_imports`.
"""

from __future__ import annotations

import torch
from mmcv.ops import batched_nms
from mmdet.models.test_time_augs import DetTTAModel
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData

from ..registry import MODELS, register

DIMS_OF_FLIP = {'horizontal': (-1,), 'vertical': (-2,), 'diagonal': (-2, -1)}  # of (N, H, W)


@register(MODELS)
class InstanceTTAModel(DetTTAModel):
    """Merges the predictions for scaled and flipped views of an image.

    The boxes of all views go through one non-maximum suppression; each box keeps the mask that was
    predicted with it.

    Args:
        tta_cfg: `nms` (as for `mmcv.ops.batched_nms`) and `max_per_img`, the maximum number of
            instances.
        **kwargs: Arguments of mmdet's `DetTTAModel`, such as `module`, the detector.

    Source: mmdet's `DetTTAModel` for boxes.
    """

    def _merge_single_sample(self, data_samples: list[DetDataSample]) -> DetDataSample:
        """Merges the views of one image, all rescaled to the image's own size."""
        views = [sample.pred_instances for sample in data_samples]
        bboxes, scores = self.merge_aug_bboxes(
            [view.bboxes for view in views],
            [view.scores for view in views],
            [sample.metainfo for sample in data_samples],
        )
        labels = torch.cat([view.labels for view in views])
        if len(labels) == 0:  # mmcv's suppression fails without boxes
            return data_samples[0]
        kept_bboxes, kept = batched_nms(bboxes, scores, labels, self.tta_cfg['nms'])
        kept = kept[: self.tta_cfg['max_per_img']]
        merged = InstanceData(
            bboxes=kept_bboxes[: len(kept), :4],
            scores=kept_bboxes[: len(kept), 4],
            labels=labels[kept],
        )
        if all('masks' in view for view in views):
            merged.masks = torch.cat([unflipped_masks(sample) for sample in data_samples])[kept]
        result = data_samples[0].clone()
        result.pred_instances = merged
        return result


def unflipped_masks(sample: DetDataSample) -> torch.Tensor:
    """Masks (N, H, W) of a view, flipped back."""
    masks = sample.pred_instances.masks
    return masks.flip(DIMS_OF_FLIP[sample.flip_direction]) if sample.flip else masks
