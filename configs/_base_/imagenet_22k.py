"""ImageNet-22K pre-training at 224x224, 90 epochs (arXiv 2211.11943); all else as imagenet_1k.py.

The paper gives the epochs; all else as on 1K is our choice. There is no validation: the accuracy
after fine-tuning on 1K is what counts.
"""

_base_ = './imagenet_1k.py'

# About 14.2 million images; at batch 1024 about 13,900 iterations an epoch.
max_epochs = 90
train_cfg = dict(max_epochs=max_epochs)
param_scheduler = _base_.param_scheduler
param_scheduler[1].update(end=max_epochs, T_max=max_epochs - _base_.warmup_epochs)
num_classes = 21_841  # the release of autumn 2011
data_preprocessor = dict(num_classes=num_classes)
model = dict(head=dict(num_classes=num_classes))
data_root = 'data/imagenet22k'
train_dataloader = dict(dataset=dict(type='ImageNet21k', data_root=data_root))
val_cfg = None
val_dataloader = None
val_evaluator = None
test_cfg = None
test_dataloader = None
test_evaluator = None
default_hooks = dict(checkpoint=dict(save_best=None, rule=None))
