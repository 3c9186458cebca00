"""UperNet on ADE20K at 640x640, with ImageNet-22K weights; otherwise like upernet.py."""

_base_ = './upernet.py'

crop_size = (640, 640)
image_scale = (2560, 640)  # longest and shortest side
model = dict(
    data_preprocessor=dict(size=crop_size),
    test_cfg=dict(crop_size=crop_size, stride=(426, 426)),  # two thirds of the crop
)
sizes = dict(  # by the type of the step
    RandomResize=dict(scale=image_scale),
    RandomCrop=dict(crop_size=crop_size),
    Resize=dict(scale=image_scale),
)
train_pipeline = [dict(step, **sizes.get(step['type'], {})) for step in _base_.train_pipeline]
test_pipeline = [dict(step, **sizes.get(step['type'], {})) for step in _base_.test_pipeline]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))

resizes = [
    dict(type='Resize', scale=(2560 * r // 4, 640 * r // 4), keep_ratio=True)
    for r in (2, 3, 4, 5, 6, 7)
]
load, augment = _base_.tta_pipeline
tta_pipeline = [load, dict(augment, transforms=[resizes, *augment['transforms'][1:]])]
