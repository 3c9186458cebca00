"""Mask R-CNN on images of 128x128, in minutes on a CPU, from random weights.

Heads are narrow and the schedule is short; docs/demo.md gives the reasons. A leaf gives the arch
and the neck's channels.
"""

_base_ = './mask_rcnn.py'

# --------------------------------------------------------------------------------------- schedule
max_epochs = 11
train_cfg = dict(max_epochs=max_epochs, val_interval=4)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=60),  # warm-up
    dict(type='MultiStepLR', begin=0, end=max_epochs, by_epoch=True, milestones=[9, 10], gamma=0.1),
]
optim_wrapper = dict(
    optimizer=dict(lr=4e-4),
    paramwise_cfg=dict(decay_rate=1.0),  # smaller rates in early layers are for pretrained weights
)
default_hooks = dict(checkpoint=dict(interval=4), logger=dict(interval=10))

# ------------------------------------------------------------------------------------------ model
channels = 96
model = dict(
    # For short training: 1e-6 and dropped blocks would take long to contribute. Memory is no
    # concern, and keeping all activations saves a tenth of a step.
    backbone=dict(layer_scale_init_value=0.1, drop_path_rate=0.0, recompute='nothing'),
    neck=dict(out_channels=channels),
    rpn_head=dict(
        in_channels=channels,
        feat_channels=channels,
        anchor_generator=dict(scales=[4]),  # objects are 15 to 70 pixels
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=channels),
        bbox_head=dict(in_channels=channels, fc_out_channels=256),
        mask_roi_extractor=dict(out_channels=channels),
        mask_head=dict(in_channels=channels, conv_out_channels=channels, num_convs=2),
    ),
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=200, max_per_img=100),
        rcnn=dict(sampler=dict(num=32, pos_fraction=0.5)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=50)),
)

# ------------------------------------------------------------------------------------------- data
load = dict(type='LoadImageFromFile', backend_args=None)
load_annotations = dict(type='LoadAnnotations', with_bbox=True, with_mask=True)
resize = dict(type='Resize', scale=(128, 128), keep_ratio=True)
pack_test = dict(
    type='PackDetInputs',
    meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
)
train_pipeline = [
    load,
    load_annotations,
    dict(type='RandomFlip', prob=0.5),
    resize,
    dict(type='PackDetInputs'),
]
test_pipeline = [load, resize, load_annotations, pack_test]
train_dataloader = dict(batch_size=4, num_workers=1, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(num_workers=1, dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
