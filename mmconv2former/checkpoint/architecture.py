"""Recognises a Conv2Former by the shapes in its state dict."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields

import torch.nn.functional as F
from torch import Tensor

# In the hierarchical network, with the stage, or in the isotropic one.
MODULATION_KERNEL = re.compile(r'(?:stages\.(\d+)|blocks)\.\d+\.attn\.att\.2\.weight')


@dataclass(frozen=True)
class Architecture:
    """What the shapes in a state dict say about its network; empty or None if they say nothing."""

    channels: tuple[int, ...]
    depths: tuple[int, ...]
    kernel_size: tuple[int, ...]
    mlp_ratio: float | None
    in_channels: int | None
    num_classes: int | None


def recognise_arch(state_dict: Mapping[str, Tensor]) -> Architecture:
    """Recognises the network of a state dict with the published names, one value per stage.

    Completeness is not checked. Without stages, as in the state dict of a head or of another
    network, `depths` is empty.
    """
    stages: dict[int, list[Tensor]] = {}
    for name, value in state_dict.items():
        match = MODULATION_KERNEL.fullmatch(name)
        if match and match[1] and value.dim() == 4:  # (C, 1, k, k)
            stages.setdefault(int(match[1]), []).append(value)
    kernels = [stages[stage] for stage in sorted(stages)]

    def size(name: str, axis: int) -> int | None:
        value = state_dict.get(name)
        return value.shape[axis] if value is not None and value.dim() > axis else None

    hidden_channels, channels = (size('stages.0.0.mlp.fc1.weight', axis) for axis in (0, 1))
    return Architecture(
        channels=tuple(stage[0].shape[0] for stage in kernels),
        depths=tuple(len(stage) for stage in kernels),
        kernel_size=tuple(stage[0].shape[-1] for stage in kernels),
        mlp_ratio=hidden_channels / channels if hidden_channels and channels else None,
        in_channels=size('downsample_layers.0.0.weight', 1),
        num_classes=size('pred.weight', 0),
    )


def differences(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Iterator[str]:
    """Describes how the network in a file differs from the model's; both may be whole models.

    Stages in the file after the model's last are ignored: `out_indices` may leave them out.
    """
    in_file, in_model = (
        recognise_arch({name.removeprefix('backbone.'): value for name, value in names.items()})
        for names in (found, expected)
    )
    for field in fields(Architecture):
        ours, theirs = getattr(in_model, field.name), getattr(in_file, field.name)
        if isinstance(ours, tuple):
            theirs = theirs[: len(ours)]
        if ours and theirs and ours != theirs:
            hint = (
                ' (adapt_kernel=True pads smaller kernels)' if field.name == 'kernel_size' else ''
            )
            yield f'{field.name} is {theirs} in the file, {ours} in the model{hint}'


def pad_kernels(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Pads the kernels of the modulations with zeros to the expected size.

    A kernel centred in zeros is the same convolution, so the output does not change. Larger
    kernels are left unchanged, since cutting them would change it.

    Args:
        found: Names and tensors of a file, kernels of shape (C, 1, k, k).
        expected: Those of the model, kernels of shape (C, 1, K, K); K and k are odd.
    """
    padded = dict(found)
    for name in filter(MODULATION_KERNEL.fullmatch, expected):
        if name in found and found[name].dim() == 4:
            margin = (expected[name].shape[-1] - found[name].shape[-1]) // 2
            padded[name] = F.pad(found[name], [max(margin, 0)] * 4)
    return padded
