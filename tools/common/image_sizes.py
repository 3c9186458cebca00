"""Changes all image sizes of a recipe together."""

from __future__ import annotations

from typing import Any

from mmengine.config import Config

# Sizes in pipeline steps: an int, (width, height), or a list of these.
SIZE_ARGUMENTS = ('scale', 'scales', 'crop_size')


def scale_images(config: Config, side: int) -> None:
    """Scales images and crops, in training, evaluation and test-time augmentation.

    Args:
        config: A recipe, changed in place.
        side: The new short side of the images that are evaluated, or of the crops if the recipe has
            crops of one size; all other sizes change in proportion.
    """
    old = own_side(config)

    def scaled(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(scaled(item) for item in value)
        return round(value * side / old)

    def scale_steps(steps: Any) -> Any:
        if isinstance(steps, (list, tuple)):
            return [scale_steps(step) for step in steps]
        if not isinstance(steps, dict):
            return steps
        return {
            key: scaled(value) if key in SIZE_ARGUMENTS else scale_steps(value)
            for key, value in steps.items()
        }

    for part in ('train', 'val', 'test'):
        loader = config.get(f'{part}_dataloader')
        if loader is not None:
            loader.dataset.pipeline = scale_steps(loader.dataset.pipeline)
    if config.get('tta_pipeline') is not None:
        config.tta_pipeline = scale_steps(config.tta_pipeline)
    if config.default_scope == 'mmseg':
        config.model.data_preprocessor.size = scaled(config.model.data_preprocessor.size)
        for key in {'crop_size', 'stride'} & config.model.test_cfg.keys():  # of sliding windows
            config.model.test_cfg[key] = scaled(config.model.test_cfg[key])


def own_side(config: Config) -> int:
    """The short side of a recipe's images, or the side of its crops."""
    if config.default_scope == 'mmseg':
        return min(config.model.data_preprocessor.size)
    if config.default_scope == 'mmpretrain':
        crops = config.train_dataloader.dataset.pipeline
        return next(step.scale for step in crops if step.type == 'RandomResizedCrop')
    resizes = config.val_dataloader.dataset.pipeline
    return min(next(step.scale for step in resizes if step.type == 'Resize'))
