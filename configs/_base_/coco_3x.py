"""COCO instance segmentation, 3x schedule with multi-scale training, for any detector.

The paper (arXiv 2211.11943, section 4.2) trains with ConvNeXt's strategy: this is ConvNeXt's
published recipe (arXiv 2201.03545, appendix A.3). Learning rate and decay rate depend on the
detector and the size.
"""

_base_ = ['mmdet::_base_/datasets/coco_instance.py', 'mmdet::_base_/default_runtime.py']
custom_imports = dict(
    imports=['mmconv2former', 'mmconv2former.models.instance_tta'], allow_failed_imports=False
)
runner_type = 'mmconv2former.ReliableRunner'  # survives interruptions (docs/reliability.md)

# --------------------------------------------------------------------------------------- schedule
# 118,287 training images, of which 117,266 have objects; batch 16 = 8 GPUs x 2 images:
# 7,330 iterations an epoch, 263,880 in 36 epochs ("3x"); the rate falls after epochs 27 and 33.
max_epochs = 36
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=max_epochs, val_interval=1)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=1000),  # warm-up
    dict(
        type='MultiStepLR',
        begin=0,
        end=max_epochs,
        by_epoch=True,
        milestones=[27, 33],
        gamma=0.1,
    ),
]
optim_wrapper = dict(
    type='OptimWrapper',
    constructor='mmconv2former.LayerDecayOptimWrapperConstructor',
    paramwise_cfg=dict(decay_type='layer_wise'),
    optimizer=dict(type='AdamW', betas=(0.9, 0.999), weight_decay=0.05),
)
auto_scale_lr = dict(enable=False, base_batch_size=16)

# ------------------------------------------------------------------------------------------- data
# Short side 480 to 800, or a crop of a smaller image resized to that: DETR's augmentation, which
# ConvNeXt uses.
short_sides = [(size, 1333) for size in range(480, 801, 32)]
train_pipeline = [
    dict(type='LoadImageFromFile', backend_args=None),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='RandomFlip', prob=0.5),
    dict(
        type='RandomChoice',
        transforms=[
            [dict(type='RandomChoiceResize', scales=short_sides, keep_ratio=True)],
            [
                dict(
                    type='RandomChoiceResize',
                    scales=[(400, 1333), (500, 1333), (600, 1333)],
                    keep_ratio=True,
                ),
                dict(
                    type='RandomCrop',
                    crop_type='absolute_range',
                    crop_size=(384, 600),
                    allow_negative_crop=True,
                ),
                dict(type='RandomChoiceResize', scales=short_sides, keep_ratio=True),
            ],
        ],
    ),
    dict(type='PackDetInputs'),
]
# One worker prepares about 77 training images a second (docs/performance.md), a GPU needs up to
# about 20: four workers leave room for slower processors and file systems, and for images with many
# objects. The base keeps workers between epochs (`persistent_workers`). Without a GPU the runner
# does not pin memory.
train_dataloader = dict(
    batch_size=2, num_workers=4, pin_memory=True, dataset=dict(pipeline=train_pipeline)
)
val_dataloader = dict(num_workers=2, pin_memory=True)
test_dataloader = val_dataloader

# ------------------------------------------------------------------------- test-time augmentation
# `tools/test.py --tta`; scales and flip are our choice.
tta_model = dict(
    type='mmconv2former.InstanceTTAModel',
    tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100),
)
tta_pipeline = [
    dict(type='LoadImageFromFile', backend_args=None),
    dict(
        type='TestTimeAug',
        transforms=[
            [
                dict(type='Resize', scale=scale, keep_ratio=True)
                for scale in [(1066, 640), (1333, 800), (1600, 960)]
            ],
            [dict(type='RandomFlip', prob=prob) for prob in (0.0, 1.0)],
            [dict(type='LoadAnnotations', with_bbox=True, with_mask=True)],
            [
                dict(
                    type='PackDetInputs',
                    meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor',
                               'flip', 'flip_direction'),
                )
            ],
        ],
    ),
]  # fmt: skip

# ---------------------------------------------------------------------------------------- runtime
# Each process draws its own drop paths; otherwise all GPUs would drop the same blocks at once.
randomness = dict(seed=None, diff_rank_seed=True)
default_hooks = dict(
    checkpoint=dict(
        type='CheckpointHook', interval=1, max_keep_ckpts=3, save_best='auto', rule='greater'
    )
)
