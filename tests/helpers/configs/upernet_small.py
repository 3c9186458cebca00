"""UperNet with Conv2Former-N on crops of 64x64 pixels, with narrow heads, from random weights."""

_base_ = '../../../configs/segmentation/upernet_conv2former_n.py'

crop_size = (64, 64)
image_scale = (256, 64)
model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(init_cfg=None),
    decode_head=dict(channels=32),
    auxiliary_head=dict(channels=32),
    test_cfg=dict(crop_size=crop_size, stride=(42, 42)),
)
small = dict(
    RandomResize=dict(scale=image_scale),
    RandomCrop=dict(crop_size=crop_size),
    Resize=dict(scale=image_scale),
)
train_pipeline = [dict(step, **small.get(step['type'], {})) for step in _base_.train_pipeline]
test_pipeline = [dict(step, **small.get(step['type'], {})) for step in _base_.test_pipeline]
train_dataloader = dict(num_workers=1, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(num_workers=1, dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
