"""Recognises a Conv2Former by the shapes in its state dict."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields

import torch.nn.functional as F
from torch import Tensor

from .reading import CheckpointError

# Of the hierarchical network, with its stage, or of the isotropic one.
MODULATION_KERNEL = re.compile(r'(?:stages\.(\d+)|blocks)\.\d+\.attn\.att\.2\.weight')


@dataclass(frozen=True)
class Architecture:
    """What the shapes of a state dict tell of its network; empty or None is what they do not."""

    channels: tuple[int, ...]
    depths: tuple[int, ...]
    kernel_size: tuple[int, ...]
    mlp_ratio: float | None
    in_channels: int | None
    num_classes: int | None


def recognise_arch(state_dict: Mapping[str, Tensor]) -> Architecture:
    """The network of a state dict with the published names: one value a stage, from shapes alone.

    Nothing is checked for completeness. Without stages of modulations, as in the state dict of a
    head or of another network, `depths` is empty.
    """
    blocks: dict[int, list[Tensor]] = {}
    for name, value in state_dict.items():
        match = MODULATION_KERNEL.fullmatch(name)
        if match and match[1] and value.dim() == 4:  # (C, 1, k, k)
            blocks.setdefault(int(match[1]), []).append(value)
    stages = [blocks[stage] for stage in sorted(blocks)]

    def size(name: str, axis: int) -> int | None:
        value = state_dict.get(name)
        return value.shape[axis] if value is not None and value.dim() > axis else None

    hidden_channels, in_channels = (size('stages.0.0.mlp.fc1.weight', axis) for axis in (0, 1))
    return Architecture(
        channels=tuple(stage[0].shape[0] for stage in stages),
        depths=tuple(len(stage) for stage in stages),
        kernel_size=tuple(stage[0].shape[-1] for stage in stages),
        mlp_ratio=hidden_channels / in_channels if hidden_channels and in_channels else None,
        in_channels=size('downsample_layers.0.0.weight', 1),
        num_classes=size('pred.weight', 0),
    )


def differences(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Iterator[str]:
    """In which respects the network of a file is not the model's, in words.

    Stages of the file behind the model's last do not count: `out_indices` may leave them out.
    """
    in_file, in_model = recognise_arch(found), recognise_arch(expected)
    for field in fields(Architecture):
        ours, theirs = getattr(in_model, field.name), getattr(in_file, field.name)
        if isinstance(ours, tuple):
            theirs = theirs[: len(ours)]
        if ours and theirs and ours != theirs:
            hint = ' (adapt_kernel=True pads smaller ones)' if field.name == 'kernel_size' else ''
            yield f'{field.name} is {theirs} in the file, {ours} in the model{hint}'


def pad_kernels(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The modulations' kernels, padded with zeros around to the size of the expected ones.

    A centred kernel in zeros is the same convolution, so the output stays as it was; smaller
    kernels would change it.

    Args:
        found: Names and tensors of a file, kernels of shape (C, 1, k, k).
        expected: Those of the model, kernels of shape (C, 1, K, K) with K >= k, odd as k is.

    Raises:
        CheckpointError: An expected kernel is smaller than the one found.
    """
    padded = dict(found)
    for name in filter(MODULATION_KERNEL.fullmatch, expected):
        if name not in found or found[name].dim() != 4:
            continue
        old, new = found[name].shape[-1], expected[name].shape[-1]
        if new < old:
            raise CheckpointError(
                f'kernel_size can only grow, as a smaller kernel has another output: {name} is '
                f'{old}x{old} in the file, {new}x{new} in the model'
            )
        padded[name] = F.pad(found[name], [(new - old) // 2] * 4)
    return padded
