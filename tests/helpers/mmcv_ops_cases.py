"""Calls of mmcv's operators, and what the compiled ones compute: values and gradients.

    python tests/helpers/mmcv_ops_cases.py     # with compiled operators: writes the reference

The reference stands beside this file, so that tests can compare without compiled operators.
"""

import importlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

REFERENCE = Path(__file__).with_name('mmcv_ops_reference.npz')
MODULES = (
    'nms roi_align focal_loss deform_conv modulated_deform_conv bbox multi_scale_deform_attn'
).split()


def random(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def boxes(number, side, seed):
    """Boxes (number, 4) with corners within 1.5 sides, some beyond an image of `side`."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(number, 2, generator=generator) * side
    return torch.cat([corners, corners + torch.rand(number, 2, generator=generator) * side / 2], 1)


def with_gradients(function, *inputs):
    """The output of a function and the gradients of a loss that differs at every place."""
    inputs = [value.clone().requires_grad_() for value in inputs]
    output = function(*inputs)
    (output * torch.linspace(-1, 1, output.numel()).view(output.shape)).sum().backward()
    return [output.detach(), *(value.grad for value in inputs)]


def cases():
    """Name and call of each case; each call returns a list of tensors."""
    from mmcv import ops

    for number in (0, 1, 30):
        found = boxes(number, 40, seed=0)
        scores = torch.linspace(0.1, 0.9, number)[
            torch.randperm(number, generator=torch.Generator().manual_seed(1))
        ]
        for offset in (0, 1):
            name = f'{number} boxes, offset {offset}'
            yield f'nms, {name}', lambda b=found, s=scores, o=offset: ops.nms(b, s, 0.4, offset=o)
            for method in ('naive', 'linear', 'gaussian'):
                yield (
                    f'soft_nms {method}, {name}',
                    lambda b=found, s=scores, m=method, o=offset: ops.soft_nms(
                        b, s, 0.3, 0.5, 0.05, m, o
                    ),
                )
            for mode in ('iou', 'iof'):
                for aligned in (False, True):
                    others = boxes(number if aligned else 20, 40, seed=2)
                    yield (
                        f'bbox_overlaps {mode}, aligned {aligned}, {name}',
                        lambda b=found, c=others, m=mode, a=aligned, o=offset: [
                            ops.bbox_overlaps(b, c, m, a, o)
                        ],
                    )
        classes = torch.arange(number) % 3
        for kind in ('nms', 'soft_nms') if number else ():  # mmcv takes none
            yield (
                f'batched_nms {kind}, {number} boxes',
                lambda b=found, s=scores, c=classes, k=kind: ops.batched_nms(
                    b, s, c, dict(type=k, iou_threshold=0.4)
                ),
            )
    for number in (0, 6):
        images = torch.arange(number)[:, None] % 2
        rois = torch.cat([images.float(), boxes(number, 60, seed=3)], 1)
        for aligned in (True, False):
            for ratio in (0, 2):
                yield (
                    f'roi_align avg, aligned {aligned}, ratio {ratio}, {number} regions',
                    lambda r=rois, a=aligned, s=ratio: with_gradients(
                        lambda x: ops.roi_align(x, r, (3, 2), 0.3, s, 'avg', a),
                        random(2, 3, 12, 16, seed=4),
                    ),
                )
    for groups, offset_groups in ((1, 1), (2, 1), (1, 2), (2, 2)):
        inputs = (
            random(2, 4, 7, 6, seed=5),
            random(2, offset_groups * 18, 4, 3, seed=6),
            random(6, 4 // groups, 3, 3, seed=7),
        )
        name = f'{groups} groups, {offset_groups} of offsets'
        setting = (2, 1, 1, groups, offset_groups)
        yield (
            f'deform_conv2d, {name}',
            lambda i=inputs, s=setting: with_gradients(
                lambda x, o, w: ops.deform_conv2d(x, o, w, *s), *i
            ),
        )
        more = (random(2, offset_groups * 9, 4, 3, seed=8).sigmoid(), random(6, seed=9))
        yield (
            f'modulated_deform_conv2d, {name}',
            lambda i=inputs, m=more, s=setting: with_gradients(
                lambda x, o, w, mask, b: ops.modulated_deform_conv2d(x, o, mask, w, b, *s), *i, *m
            ),
        )
        yield (
            f'modulated_deform_conv2d without bias, {name}',
            lambda i=inputs, m=more, s=setting: with_gradients(
                lambda x, o, w, mask: ops.modulated_deform_conv2d(x, o, mask, w, None, *s), *i, m[0]
            ),
        )


@contextmanager
def operators(extension):
    """Lets mmcv's Python wrappers call the operators of another module."""
    modules = [importlib.import_module(f'mmcv.ops.{name}') for name in MODULES]
    before = [module.ext_module for module in modules]
    try:
        for module in modules:
            module.ext_module = extension
        yield
    finally:
        for module, old in zip(modules, before):
            module.ext_module = old


def main():
    import mmcv._ext

    if Path(mmcv._ext.__file__ or '').suffix != '.so':
        raise SystemExit('error: mmcv has no compiled operators here')
    arrays = {
        f'{name}/{i}': value.numpy() for name, call in cases() for i, value in enumerate(call())
    }
    np.savez_compressed(REFERENCE, **arrays)


if __name__ == '__main__':
    main()
