"""UperNet, Swin-T instead of Conv2Former-T, all else equal; not trained here."""

_base_ = '../segmentation/upernet_conv2former_t.py'
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmconv2former.Baseline',
        name='swin_tiny',
        drop_path_rate=0.4,
        init_cfg=dict(type='Pretrained', checkpoint='pretrain/swin_tiny.pth'),
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'relative_position_bias': dict(decay_mult=0)}))
