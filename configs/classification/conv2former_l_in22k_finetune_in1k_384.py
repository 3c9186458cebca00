"""Conv2Former-L, 22K to 1K at 384: published top-1 87.7 (official repository); not trained here."""

_base_ = '../_base_/imagenet_finetune_384.py'

weights = 'pretrain/conv2former_l_in22k.pth'
model = dict(
    backbone=dict(
        arch='large',
        drop_path_rate=0.3,  # our choice: ConvNeXt-L's
        init_cfg=dict(type='Pretrained', checkpoint=weights),
    ),
    head=dict(in_channels=1024, init_cfg=dict(checkpoint=weights)),
)
