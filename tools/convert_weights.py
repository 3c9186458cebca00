"""Makes a small, clean weight file from any checkpoint of `Conv2Former` (not the isotropic ones).

    python tools/convert_weights.py conv2former_t.pth.tar pretrain/conv2former_t.pth
    python tools/convert_weights.py conv2former_b_22k.pth pretrain/conv2former_b_in22k.pth \\
        --arch base --kernel-size 7 --adapt-kernel 11
    python tools/convert_weights.py conv2former_t.pth.tar conv2former_t_in1k.pth --classifier

Reads published files, those of mmpretrain, mmdet and mmseg, plain state dicts and safetensors, and
recognises the architecture by the shapes. Writes the backbone with the published names, or with
--classifier mmpretrain's whole ImageClassifier. The file's name gets the first eight digits of its
SHA-256, as mmpretrain's have: `conv2former_t-1a2b3c4d.pth`. See docs/weights.md.
"""

from __future__ import annotations

import argparse
import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import common  # before torch
import torch
from common.cli import add_trust_argument, guard_checkpoints
from torch import Tensor

from mmconv2former import Conv2Former
from mmconv2former.checkpoint.architecture import Architecture, pad_kernels, recognise_arch
from mmconv2former.checkpoint.loading import (
    NEW_FOR_DENSE_PREDICTION,
    check_fit,
    find_prefix,
    first_parts,
    non_finite,
)
from mmconv2former.checkpoint.reading import (
    FIRST_KERNEL,
    CheckpointError,
    in_whole_model,
    read_state_dict,
)
from mmconv2former.models.arguments import parse_arch, parse_kernel_size
from mmconv2former.models.conv2former import ARCH_LETTERS, ARCHS
from mmconv2former.text import first, printable

HEAD_NAMES = [
    f'{layer}.{kind}' for layer in ('head.0', 'head.2', 'pred') for kind in ('weight', 'bias')
]
SUFFIXES = ('.pth', '.safetensors')


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.parser_of(__doc__)
    parser.add_argument('checkpoint', help='file to read')
    parser.add_argument('out', type=Path, help='file to write, .pth or .safetensors')
    parser.add_argument(
        '--classifier', action='store_true', help='keep the classification head, for mmpretrain'
    )
    parser.add_argument('--ema', action='store_true', help='use the averaged weights')
    parser.add_argument('--arch', help=f'expected size: {", ".join(ARCHS)}')
    parser.add_argument(
        '--kernel-size', type=int, nargs='+', metavar='K', help='expected kernel size'
    )
    parser.add_argument(
        '--adapt-kernel',
        type=int,
        nargs='+',
        metavar='K',
        help='pad the kernels with zeros to this size (one, or one per stage); same output',
    )
    parser.add_argument('--force', action='store_true', help='replace an existing file')
    add_trust_argument(parser)
    args = parser.parse_args(argv)
    if args.out.suffix not in SUFFIXES:
        parser.error(f'the output must end with {" or ".join(SUFFIXES)}, got {args.out}')
    guard_checkpoints(args)
    try:
        convert(args)
    except (ValueError, OSError) as error:
        raise SystemExit(f'error: {printable(error)}') from None


def convert(args: argparse.Namespace) -> None:
    """Reads, checks, reports and writes.

    Raises:
        ValueError, OSError: See `read_state_dict`, `check_expectations`, `check_fit`, `write`.
    """
    state_dict = read_state_dict(args.checkpoint, averaged=args.ema)
    prefix, head_prefix = (find_prefix(state_dict, names) for names in ([FIRST_KERNEL], HEAD_NAMES))
    found = {n[len(prefix) :]: value for n, value in state_dict.items() if n.startswith(prefix)}
    head = {n: state_dict[head_prefix + n] for n in HEAD_NAMES if head_prefix + n in state_dict}
    architecture = recognise_arch(found | head)
    if not architecture.depths:
        raise CheckpointError(
            f'{args.checkpoint} is not a Conv2Former: it has no {FIRST_KERNEL}; its names begin '
            f'with {first_parts(state_dict)}'
        )
    print(f'read      {args.checkpoint}: {len(state_dict)} tensors')
    print(f'found     {describe(architecture)}')
    check_expectations(args, architecture)
    kernel_size = expand(args.adapt_kernel or architecture.kernel_size, architecture)
    backbone = empty_backbone(architecture, kernel_size, out_norm=not args.classifier)
    expected = backbone.state_dict()
    needed = {name for name in expected if not NEW_FOR_DENSE_PREDICTION.fullmatch(name)}
    tensors, _ = check_fit(backbone, pad_kernels(found, expected), needed, args.checkpoint)
    weights = {name: tensors[name] for name in expected if name in tensors}
    used = {prefix + name for name in weights}
    if args.classifier:
        if missing := [name for name in HEAD_NAMES if name not in head]:
            raise CheckpointError(
                f'{args.checkpoint}: --classifier: the classification head lacks {missing}'
            )
        used |= {head_prefix + name for name in head}
        weights = dict(in_whole_model(weights | head))
    if names := non_finite(weights):
        raise CheckpointError(
            f'checkpoint {str(args.checkpoint)!r} is damaged: {len(names)} tensors are NaN or '
            f'infinite, such as {first(names, 3)}'
        )
    dropped = Counter(name.split('.')[0] for name in state_dict if name not in used)
    count = sum(value.numel() for value in weights.values())
    print(f'used      {len(weights)} tensors, {count / 1e6:.2f} M numbers')
    parts = first((f'{n} of {part}' for part, n in dropped.most_common()), 8)
    print(f'dropped   {", ".join(parts) or "none"}{", ..." * (len(dropped) > 8)}')
    if kernel_size != architecture.kernel_size:
        print(f'padded    kernels to {shorten(kernel_size)}')

    meta = asdict(architecture) | {'kernel_size': kernel_size}
    path = write(weights, meta, args.out, args.force)
    print(f'wrote     {path} ({path.stat().st_size / 1e6:.1f} MB)')
    if args.classifier:
        print(f'use it    python tools/test.py CONFIG {path}')
    else:
        print(f'use it    --cfg-options model.backbone.init_cfg.checkpoint={path}')


def check_expectations(args: argparse.Namespace, found: Architecture) -> None:
    """Compares the file with what the user expects.

    Raises:
        CheckpointError: The file is of another network.
        ValueError: `--arch` or `--kernel-size` is not valid.
    """
    if args.arch is not None:
        named = parse_arch(args.arch, ARCHS, ARCH_LETTERS)
        if (named.channels, named.depths) != (found.channels, found.depths):
            raise CheckpointError(
                f'{args.checkpoint}: --arch {args.arch} was expected, found {describe(found)}'
            )
    if args.kernel_size is not None:
        wanted = expand(args.kernel_size, found)
        if wanted != found.kernel_size:
            raise CheckpointError(
                f'{args.checkpoint}: --kernel-size {shorten(wanted)} was expected, '
                f'found {shorten(found.kernel_size)}'
            )


def expand(kernel_size: Sequence[int], architecture: Architecture) -> tuple[int, ...]:
    """One kernel size per stage, from one number or one per stage."""
    size = kernel_size[0] if len(kernel_size) == 1 else kernel_size
    return parse_kernel_size(size, len(architecture.depths))


def shorten(kernel_size: tuple[int, ...]) -> int | tuple[int, ...]:
    """One number if all stages have the same."""
    return kernel_size[0] if len(set(kernel_size)) == 1 else kernel_size


def describe(architecture: Architecture) -> str:
    """An architecture in words, by its name if it has one."""
    shape = (architecture.channels, architecture.depths)
    names = [name for name, arch in ARCHS.items() if (arch.channels, arch.depths) == shape]
    parts = [
        f'arch {names[0] if names else "without a name"}',
        f'kernel_size {shorten(architecture.kernel_size)}',
        f'channels {architecture.channels}',
        f'depths {architecture.depths}',
        f'mlp_ratio {architecture.mlp_ratio:g}' if architecture.mlp_ratio else 'no feed-forward',
        f'{architecture.num_classes} classes' if architecture.num_classes else 'no head',
    ]
    return ', '.join(parts)


def empty_backbone(
    architecture: Architecture, kernel_size: tuple[int, ...], out_norm: bool
) -> Conv2Former:
    """The backbone without initialisation, which takes longer than everything else."""
    with torch.device('meta'):
        backbone = Conv2Former(
            dict(channels=architecture.channels, depths=architecture.depths),
            in_channels=architecture.in_channels or 3,
            kernel_size=kernel_size,
            mlp_ratio=architecture.mlp_ratio or 4,
            out_indices=range(len(architecture.depths)),
            out_norm=out_norm,
        )
    return backbone.to_empty(device='cpu')


def write(weights: dict[str, Tensor], meta: dict, out: Path, force: bool) -> Path:
    """Writes a file completely or not at all, with its checksum in the name.

    Args:
        weights: Names and tensors.
        meta: Stored beside them in a `.pth` file.
        out: `DIR/NAME.SUFFIX`; `DIR/NAME-XXXXXXXX.SUFFIX` is written.
        force: Whether an existing file of this name is replaced.

    Raises:
        FileExistsError: The file exists and `force` is not set.
        OSError: The folder is not writable, or the disk is full.
        CheckpointError: safetensors is not installed.
    """
    # Own storages, because a view would write its whole base to the file.
    weights = {
        name: value.detach().clone(memory_format=torch.contiguous_format)
        for name, value in weights.items()
    }
    partial = out.with_name(f'.{out.name}.{os.getpid()}.partial')
    try:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            with partial.open('xb') as file:
                if out.suffix == '.safetensors':
                    file.write(to_safetensors(weights))
                else:
                    # To a file object, so that the bytes and the checksum do not depend on its
                    # name.
                    torch.save(dict(meta=meta, state_dict=weights), file)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            raise OSError(f'cannot write into {out.parent}: {error}') from error
        digest = hashlib.sha256(partial.read_bytes()).hexdigest()
        path = out.with_name(f'{out.stem}-{digest[:8]}{out.suffix}')
        if path.exists() and not force:
            raise FileExistsError(f'{path} exists already; --force replaces it')
        os.replace(partial, path)
    finally:
        if partial.is_file():
            partial.unlink()
    return path


def to_safetensors(weights: dict[str, Tensor]) -> bytes:
    """The content of a safetensors file.

    Raises:
        CheckpointError: The package is missing.
    """
    try:  # optional, as for reading
        from safetensors.torch import save
    except ImportError as error:
        raise CheckpointError(
            'writing .safetensors needs a package: pip install safetensors'
        ) from error
    return save(weights, metadata={'format': 'pt'})


if __name__ == '__main__':
    main()
