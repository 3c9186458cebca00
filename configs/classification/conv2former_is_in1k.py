"""Conv2Former-IS, 16x16 patches: published top-1 81.2 (arXiv 2211.11943); not trained here."""

_base_ = '../_base_/imagenet_1k.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmconv2former.Conv2FormerIsotropic',
        arch='is',
        patch_embedding='plain',
        out_norm=False,
        drop_path_rate=0.1,  # our choice
    ),
    head=dict(in_channels=320),
)
