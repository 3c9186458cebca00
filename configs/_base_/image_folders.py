"""Fine-tuning on your own image folders from ImageNet weights; all else as imagenet_finetune.py.

    data/my_images/train/CLASS/*.jpg, data/my_images/val/CLASS/*.jpg

Both have the same classes, numbered by name. Every value here is our choice.
"""

_base_ = './imagenet_finetune.py'

data_root = 'data/my_images'
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='RandomResizedCrop',
        scale=224,
        crop_ratio_range=(0.35, 1.0),
        backend='pillow',
        interpolation='bicubic',
    ),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='PackInputs'),
]
dataset = dict(_delete_=True, type='CustomDataset', data_root=data_root)
train_dataloader = dict(
    dataset=dict(data_prefix='train', pipeline=train_pipeline, **dataset),
)
val_dataloader = dict(dataset=dict(data_prefix='val', pipeline=_base_.test_pipeline, **dataset))
test_dataloader = val_dataloader
val_evaluator = dict(topk=(1,))  # there may be fewer than five classes
test_evaluator = val_evaluator
