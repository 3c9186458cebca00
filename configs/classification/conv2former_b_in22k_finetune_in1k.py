"""Conv2Former-B, 22K to 1K at 224: published top-1 86.2 (official repository); not trained here."""

_base_ = '../_base_/imagenet_finetune.py'

weights = 'pretrain/conv2former_b_in22k.pth'
model = dict(
    backbone=dict(
        arch='base',
        kernel_size=7,  # as the published 22K weights of B
        drop_path_rate=0.2,  # our choice: ConvNeXt-B's
        init_cfg=dict(type='Pretrained', checkpoint=weights),
    ),
    head=dict(in_channels=768, init_cfg=dict(checkpoint=weights)),
)
