"""UperNet on ADE20K at 512x512, 160,000 iterations, for any size of Conv2Former.

The paper (arXiv 2211.11943, section 4.3) trains with ConvNeXt's strategy: this is ConvNeXt's
published recipe (arXiv 2201.03545, appendix A.3), unless marked "our choice".
A leaf gives the backbone's arch, drop path and weights, and the heads' channels.
"""

default_scope = 'mmseg'
custom_imports = dict(imports=['mmconv2former'], allow_failed_imports=False)
runner_type = 'mmconv2former.ReliableRunner'  # survives interruptions (docs/reliability.md)

# --------------------------------------------------------------------------------------- schedule
# 20,210 training images, batch 16 = 8 GPUs x 2 crops: 160,000 iterations are 126.7 epochs.
max_iters = 160_000
warmup_iters = 1500
train_cfg = dict(type='IterBasedTrainLoop', max_iters=max_iters, val_interval=16_000)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=warmup_iters),
    dict(
        type='PolyLR', power=1.0, begin=warmup_iters, end=max_iters, eta_min=0.0, by_epoch=False
    ),
]  # fmt: skip
optim_wrapper = dict(
    type='OptimWrapper',
    constructor='mmconv2former.LayerDecayOptimWrapperConstructor',
    paramwise_cfg=dict(decay_type='stage_wise', decay_rate=0.9),
    optimizer=dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
)
auto_scale_lr = dict(enable=False, base_batch_size=16)

# ------------------------------------------------------------------------------------------ model
crop_size = (512, 512)
num_classes = 150
norm_cfg = dict(type='SyncBN', requires_grad=True)
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(
        type='SegDataPreProcessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
        size=crop_size,
        # The smallest input of the backbone. Larger images are unchanged.
        test_cfg=dict(size=(32, 32)),
    ),
    backbone=dict(type='mmconv2former.Conv2Former', out_indices=(0, 1, 2, 3)),
    decode_head=dict(
        type='UPerHead',
        in_index=[0, 1, 2, 3],
        pool_scales=(1, 2, 3, 6),
        channels=512,
        dropout_ratio=0.1,
        num_classes=num_classes,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
    ),
    auxiliary_head=dict(
        type='FCNHead',
        in_index=2,
        channels=256,
        num_convs=1,
        concat_input=False,
        dropout_ratio=0.1,
        num_classes=num_classes,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=0.4),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode='slide', crop_size=crop_size, stride=(341, 341)),  # two thirds of the crop
)

# ------------------------------------------------------------------------------------------- data
data_root = 'data/ade/ADEChallengeData2016'
image_scale = (2048, 512)  # longest and shortest side
load_labels = dict(type='LoadAnnotations')  # ADE20KDataset turns 0, "other", into 255
train_pipeline = [
    dict(type='LoadImageFromFile'),
    load_labels,
    dict(type='RandomResize', scale=image_scale, ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type='RandomCrop', crop_size=crop_size, cat_max_ratio=0.75),
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
# One worker prepares about 133 training crops a second (docs/performance.md), a GPU needs up to
# about 40: four workers leave room for slower processors and file systems. Without a GPU the runner
# does not pin memory.
workers = dict(num_workers=4, persistent_workers=True, pin_memory=True)
train_dataloader = dict(
    batch_size=2,
    **workers,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        type='ADE20KDataset',
        data_root=data_root,
        data_prefix=dict(img_path='images/training', seg_map_path='annotations/training'),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1,
    **workers,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='ADE20KDataset',
        data_root=data_root,
        data_prefix=dict(img_path='images/validation', seg_map_path='annotations/validation'),
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator

# ------------------------------------------------------------------------- test-time augmentation
# `tools/test.py --tta`: six scales and flip, the multi-scale protocol of the published numbers.
# Ratios refer to the test scale, not to the image's own size.
tta_model = dict(type='SegTTAModel')
tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='TestTimeAug',
        transforms=[
            [
                dict(type='Resize', scale=scale, keep_ratio=True)
                for scale in [(2048 * r // 4, 512 * r // 4) for r in (2, 3, 4, 5, 6, 7)]
            ],
            [dict(type='RandomFlip', prob=prob, direction='horizontal') for prob in (0.0, 1.0)],
            [load_labels],
            [dict(type='PackSegInputs')],
        ],
    ),
]

# ---------------------------------------------------------------------------------------- runtime
env_cfg = dict(
    cudnn_benchmark=True,  # all crops have one size
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    dist_cfg=dict(backend='nccl'),
)
# Each process draws its own drop paths; otherwise all GPUs would drop the same blocks at once.
randomness = dict(seed=None, diff_rank_seed=True)
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=50, log_metric_by_epoch=False),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(
        type='CheckpointHook',
        by_epoch=False,
        interval=16_000,
        max_keep_ckpts=3,
        save_best='mIoU',
        rule='greater',
    ),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    visualization=dict(type='SegVisualizationHook'),
)
vis_backends = [dict(type='LocalVisBackend')]
visualizer = dict(type='SegLocalVisualizer', vis_backends=vis_backends, name='visualizer')
log_processor = dict(by_epoch=False)
log_level = 'INFO'
load_from = None
resume = False
