"""Conv2Former-S, 22K to 1K at 224: published top-1 84.9 (official repository); not trained here."""

_base_ = '../_base_/imagenet_finetune.py'

weights = 'pretrain/conv2former_s_in22k.pth'
model = dict(
    backbone=dict(
        arch='small',
        drop_path_rate=0.1,  # our choice: ConvNeXt-S's
        init_cfg=dict(type='Pretrained', checkpoint=weights),
    ),
    head=dict(in_channels=576, init_cfg=dict(checkpoint=weights)),
)
