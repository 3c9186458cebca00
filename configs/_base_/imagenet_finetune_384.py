"""As imagenet_finetune.py at 384x384; in evaluation the whole image is resized, without crop."""

_base_ = './imagenet_finetune.py'

size = 384
train_pipeline = _base_.train_pipeline
train_pipeline[1].update(scale=size)  # RandomResizedCrop
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(size, size), backend='pillow', interpolation='bicubic'),
    dict(type='PackInputs'),
]
train_dataloader = dict(batch_size=32, dataset=dict(pipeline=train_pipeline))  # 16 GPUs
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
