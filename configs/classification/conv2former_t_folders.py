"""Conv2Former-T on your own image folders, from ImageNet-1K weights; nothing published."""

_base_ = '../_base_/image_folders.py'

num_classes = 20
weights = 'pretrain/conv2former_t.pth'
model = dict(
    backbone=dict(
        arch='tiny',
        drop_path_rate=0.1,
        init_cfg=dict(type='Pretrained', checkpoint=weights),
    ),
    head=dict(in_channels=576, num_classes=num_classes, init_cfg=dict(checkpoint=weights)),
)
