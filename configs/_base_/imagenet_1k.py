"""ImageNet-1K at 224x224 from random weights, 300 epochs, for any size of Conv2Former.

The published recipe (arXiv 2211.11943, section 4.1, and its repository), unless marked "our
choice". It also names a colour jitter of 0.4, which timm's trainer, used for it, leaves out when
RandAugment is on; so does this one. Weights are not averaged, because the stem has BatchNorm.
A leaf gives the backbone's arch and drop path, and the head's channels.
"""

_base_ = [
    'mmpretrain::_base_/datasets/imagenet_bs64_swin_224.py',
    'mmpretrain::_base_/default_runtime.py',
]
custom_imports = dict(imports=['mmconv2former.models.cls_head'], allow_failed_imports=False)
runner_type = 'mmconv2former.ReliableRunner'  # survives interruptions (docs/reliability.md)

# --------------------------------------------------------------------------------------- schedule
# 1,281,167 training images, batch 1024 = 8 GPUs x 128: 1,252 iterations an epoch (the last batch is
# filled up), 375,600 in 300 epochs.
max_epochs = 300
warmup_epochs = 5
train_cfg = dict(by_epoch=True, max_epochs=max_epochs, val_interval=1)
val_cfg = dict()
test_cfg = dict()
base_lr = 1e-3  # for each 1,024 images of a batch
param_scheduler = [
    dict(
        type='LinearLR',
        start_factor=1e-6 / base_lr,
        by_epoch=True,
        begin=0,
        end=warmup_epochs,
        convert_to_iter_based=True,
    ),
    dict(
        type='CosineAnnealingLR',
        eta_min=1e-5,  # our choice
        by_epoch=True,
        begin=warmup_epochs,
        end=max_epochs,
        T_max=max_epochs - warmup_epochs,
    ),
]
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=base_lr, betas=(0.9, 0.999), weight_decay=0.05),
    # No layer-wise decay. This constructor makes two groups, one of them without weight decay
    # (norms, biases, layer scales); mmengine's would make and log one group for each parameter.
    constructor='mmconv2former.LayerDecayOptimWrapperConstructor',
    paramwise_cfg=dict(decay_rate=1.0),
)
auto_scale_lr = dict(enable=False, base_batch_size=1024)

# ------------------------------------------------------------------------------------------ model
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='mmconv2former.Conv2Former',
        out_indices=(3,),
        out_norm=False,  # the head has a norm of its own
        layer_scale_init_value=1e-6,
    ),
    head=dict(
        type='mmconv2former.Conv2FormerClsHead',
        num_classes=1000,
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'),
    ),
    train_cfg=dict(augments=[dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)]),
)

# ------------------------------------------------------------------------------------------- data
# From the base: random crops, flip, RandAugment rand-m9-mstd0.5-inc1, random erasing by noise with
# probability 0.25; in evaluation short side 256, centre crop 224; ImageNet's mean and standard
# deviation. docs/classification.md says how to evaluate with another crop or normalisation.
data_root = 'data/imagenet'
# A GPU needs hundreds of crops a second and RandAugment is expensive: eight workers at least, more
# if a node has more cores for each GPU. Without a GPU the runner does not pin memory.
loader = dict(batch_size=128, num_workers=8, persistent_workers=True, pin_memory=True)
train_dataloader = loader
val_dataloader = loader
test_dataloader = loader

# ---------------------------------------------------------------------------------------- runtime
# Each process draws its own drop paths; otherwise all GPUs would drop the same blocks at once.
randomness = dict(seed=None, diff_rank_seed=True)
env_cfg = dict(cudnn_benchmark=True)  # all crops have one size
default_hooks = dict(
    checkpoint=dict(interval=1, max_keep_ckpts=3, save_best='accuracy/top1', rule='greater')
)
