"""Merging of the views of an image: boxes and masks of one instance come back as one."""

import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from torch import nn

from mmconv2former.models.instance_tta import DIMS_OF_FLIP, InstanceTTAModel

HEIGHT, WIDTH = 40, 60
BOX = torch.tensor([6.0, 4.0, 20.0, 16.0])


class Detector(nn.Module):
    def test_step(self, data):
        raise AssertionError('only the merging is tested here')


def view(boxes, scores, labels, direction=None):
    """Predictions for one view; boxes and masks are given as they lie in the image itself."""
    boxes = torch.as_tensor(boxes).reshape(-1, 4)
    masks = torch.zeros(len(boxes), HEIGHT, WIDTH, dtype=torch.bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist()):
        mask[y1:y2, x1 : (x1 + x2) // 2] = True  # the left half: flips matter
    if direction in ('horizontal', 'diagonal'):
        boxes = torch.stack([WIDTH - boxes[:, 2], boxes[:, 1], WIDTH - boxes[:, 0], boxes[:, 3]], 1)
    if direction in ('vertical', 'diagonal'):
        boxes = torch.stack(
            [boxes[:, 0], HEIGHT - boxes[:, 3], boxes[:, 2], HEIGHT - boxes[:, 1]], 1
        )
    if direction:
        masks = masks.flip(DIMS_OF_FLIP[direction])
    meta = dict(ori_shape=(HEIGHT, WIDTH), flip=direction is not None, flip_direction=direction)
    sample = DetDataSample(metainfo=meta)
    sample.pred_instances = InstanceData(
        bboxes=boxes, scores=torch.tensor(scores), labels=torch.tensor(labels), masks=masks
    )
    return sample


def merge(*views, most=100):
    config = dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=most)
    (sample,) = InstanceTTAModel(tta_cfg=config, module=Detector()).merge_preds([list(views)])
    return sample.pred_instances


@pytest.mark.parametrize('direction', DIMS_OF_FLIP)
def test_the_better_view_wins_with_its_mask(direction):
    shifted = BOX + torch.tensor([1.0, 0, 1, 0])
    merged = merge(view(shifted, [0.6], [3]), view(BOX, [0.9], [3], direction))
    torch.testing.assert_close(merged.bboxes, BOX[None])
    torch.testing.assert_close(merged.scores, torch.tensor([0.9]))
    assert merged.labels.tolist() == [3]
    assert torch.equal(merged.masks, view(BOX, [1.0], [0]).pred_instances.masks)


def test_other_classes_and_places_are_kept_in_order_of_score():
    far = BOX + 20
    merged = merge(view(torch.stack([BOX, far]), [0.5, 0.4], [3, 3]), view(BOX, [0.7], [5]))
    assert merged.labels.tolist() == [5, 3, 3]
    torch.testing.assert_close(merged.bboxes, torch.stack([BOX, BOX, far]))
    for box, mask in zip(merged.bboxes, merged.masks):
        assert torch.equal(mask[None], view(box, [1.0], [0]).pred_instances.masks)


def test_at_most_so_many():
    boxes = torch.stack([BOX, BOX + 20])
    merged = merge(view(boxes, [0.4, 0.8], [1, 2]), most=1)
    assert merged.labels.tolist() == [2]
    assert len(merged.masks) == len(merged.bboxes) == 1


def test_no_instances():
    merged = merge(view(torch.zeros(0, 4), [], []), view(torch.zeros(0, 4), [], [], 'horizontal'))
    assert merged.bboxes.shape == (0, 4)
    assert merged.masks.shape == (0, HEIGHT, WIDTH)
