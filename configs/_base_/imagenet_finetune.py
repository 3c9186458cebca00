"""ImageNet-1K at 224x224 from ImageNet-22K weights, 30 epochs, for any size of Conv2Former.

The paper (arXiv 2211.11943) gives the epochs. The rest is our choice: ConvNeXt's fine-tuning
(arXiv 2201.03545, appendix A.2), with small rates and layer-wise decay, almost no weight decay, and
neither MixUp nor CutMix.
"""

_base_ = './imagenet_1k.py'

# 1,281,167 training images, batch 512 = 8 GPUs x 64: 2,503 iterations an epoch, 75,090 in 30.
max_epochs = 30
base_lr = 5e-5
train_cfg = dict(max_epochs=max_epochs)
param_scheduler = [
    dict(
        type='CosineAnnealingLR',
        eta_min=1e-6,
        by_epoch=True,
        begin=0,
        end=max_epochs,
        T_max=max_epochs,
        convert_to_iter_based=True,
    )
]
optim_wrapper = dict(
    optimizer=dict(lr=base_lr, weight_decay=1e-8),
    paramwise_cfg=dict(decay_rate=0.8),
)
auto_scale_lr = dict(enable=False, base_batch_size=512)
model = dict(
    train_cfg=None,
    head=dict(init_cfg=dict(type='Pretrained', new_layers=['pred'])),  # 22K has other classes
)
train_dataloader = dict(batch_size=64)
