"""Conv2Former-IS, conv embedding: published top-1 82.0 (arXiv 2211.11943); not trained here."""

_base_ = '../_base_/imagenet_1k.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmconv2former.Conv2FormerIsotropic',
        arch='is',
        patch_embedding='conv',
        out_norm=False,
        drop_path_rate=0.1,  # our choice
    ),
    head=dict(in_channels=320),
)
