"""Faster R-CNN with FPN on BCCD, blood cells, from random weights, for any size of Conv2Former.

BCCD (https://github.com/Shenggan/BCCD_Dataset, MIT) has 364 images of 640x480 with boxes of three
classes in VOC's form: 205 for training, 87 for validation, 72 for testing. All values are our
choice; docs/public_data.md has the results. A leaf gives the backbone's arch and drop path, and the
neck's channels.
"""

_base_ = ['mmdet::_base_/models/faster-rcnn_r50_fpn.py', 'mmdet::_base_/default_runtime.py']
custom_imports = dict(imports=['mmconv2former'], allow_failed_imports=False)
runner_type = 'mmconv2former.ReliableRunner'  # survives interruptions (docs/reliability.md)

# --------------------------------------------------------------------------------------- schedule
# 205 training images, batch 8: 26 iterations an epoch, 6,000 are 234 epochs. Without pretrained
# weights a detector needs many.
max_iters = 6000
warmup_iters = 300
train_cfg = dict(type='IterBasedTrainLoop', max_iters=max_iters, val_interval=500)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=warmup_iters),
    dict(
        type='CosineAnnealingLR', eta_min=0.0, by_epoch=False, begin=warmup_iters, end=max_iters
    ),
]  # fmt: skip
optim_wrapper = dict(
    type='OptimWrapper',
    constructor='mmconv2former.LayerDecayOptimWrapperConstructor',
    paramwise_cfg=dict(decay_rate=1.0),  # smaller rates in early layers are for pretrained weights
    optimizer=dict(type='AdamW', lr=4e-4, betas=(0.9, 0.999), weight_decay=0.05),
    clip_grad=dict(max_norm=10.0),  # early losses of boxes vary widely
)
auto_scale_lr = dict(enable=False, base_batch_size=8)

# ------------------------------------------------------------------------------------------ model
model = dict(
    backbone=dict(
        _delete_=True,  # else ResNet's arguments would remain
        type='mmconv2former.Conv2Former',
        out_indices=(0, 1, 2, 3),
        # With 1e-6, for long training, blocks contribute nothing for thousands of iterations.
        layer_scale_init_value=0.1,
    ),
    roi_head=dict(bbox_head=dict(num_classes=3)),
)

# ------------------------------------------------------------------------------------------- data
data_root = 'data/bccd/'
metainfo = dict(
    classes=('RBC', 'WBC', 'Platelets'), palette=[(220, 20, 60), (0, 110, 200), (255, 170, 30)]
)
train_pipeline = [
    dict(type='LoadImageFromFile', backend_args=None),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='RandomFlip', prob=[0.25, 0.25, 0.25],
         direction=['horizontal', 'vertical', 'diagonal']),  # cells have no upper side
    dict(
        type='RandomChoiceResize',
        scales=[(854, side) for side in range(384, 577, 32)],
        keep_ratio=True,
    ),
    dict(type='RandomCrop', crop_size=(480, 640), allow_negative_crop=True),
    dict(type='PhotoMetricDistortion'),  # stains and lamps differ
    dict(type='PackDetInputs'),
]  # fmt: skip
test_pipeline = [
    dict(type='LoadImageFromFile', backend_args=None),
    dict(type='Resize', scale=(640, 480), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(
        type='PackDetInputs',
        # CocoMetric reads the truth from `instances`, as there is no file in COCO's form.
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'instances'),
    ),
]
dataset = dict(
    type='XMLDataset',
    data_root=data_root,
    data_prefix=dict(sub_data_root=''),  # JPEGImages and Annotations are in data_root itself
    metainfo=metainfo,
)
workers = dict(num_workers=4, persistent_workers=True, pin_memory=True)
train_dataloader = dict(
    batch_size=8,
    **workers,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        ann_file='ImageSets/Main/train.txt',
        # The data have a box without area, which is ignored.
        filter_cfg=dict(bbox_min_size=1),
        pipeline=train_pipeline,
        **dataset,
    ),
)
val_dataloader = dict(
    batch_size=1,
    **workers,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        ann_file='ImageSets/Main/val.txt', test_mode=True, pipeline=test_pipeline, **dataset
    ),
)
test_dataloader = dict(
    batch_size=1,
    **workers,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        ann_file='ImageSets/Main/test.txt', test_mode=True, pipeline=test_pipeline, **dataset
    ),
)
val_evaluator = dict(type='CocoMetric', metric='bbox')
test_evaluator = val_evaluator

# ---------------------------------------------------------------------------------------- runtime
# Each process draws its own drop paths; otherwise all GPUs would drop the same blocks at once.
randomness = dict(seed=None, diff_rank_seed=True)
default_hooks = dict(
    logger=dict(interval=50, log_metric_by_epoch=False),
    checkpoint=dict(
        by_epoch=False, interval=500, max_keep_ckpts=1, save_best='coco/bbox_mAP', rule='greater'
    ),
)
log_processor = dict(by_epoch=False)
