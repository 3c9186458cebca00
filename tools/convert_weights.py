"""Makes a small, clean weight file of any Conv2Former checkpoint.

    python tools/convert_weights.py conv2former_t.pth.tar pretrain/conv2former_t.pth
    python tools/convert_weights.py conv2former_b_22k.pth pretrain/conv2former_b_in22k.pth \\
        --arch base --kernel-size 7 --adapt-kernel 11
    python tools/convert_weights.py conv2former_t.pth.tar conv2former_t_in1k.pth --classifier

Reads published files, those of mmpretrain, mmdet and mmseg, plain state dicts and safetensors, and
tells the architecture by the shapes. Writes the backbone alone with the published names, or with
--classifier mmpretrain's whole ImageClassifier. The name of the file gets the first eight digits of
its SHA-256, as mmpretrain's have: `conv2former_t-1a2b3c4d.pth`. See docs/weights.md.
"""

from __future__ import annotations

import argparse
import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from common.cli import add_trust_argument, guard_checkpoints
from torch import Tensor

from mmconv2former import Conv2Former
from mmconv2former.checkpoint.architecture import Architecture, pad_kernels, recognise_arch
from mmconv2former.checkpoint.loading import (
    NEW_FOR_DENSE_PREDICTION,
    behind_prefix,
    check_fit,
    find_prefix,
)
from mmconv2former.checkpoint.reading import (
    FIRST_KERNEL,
    CheckpointError,
    in_whole_model,
    read_state_dict,
)
from mmconv2former.models.arguments import parse_arch, parse_kernel_size
from mmconv2former.models.conv2former import ARCH_LETTERS, ARCHS

HEAD_NAMES = [
    f'{layer}.{kind}' for layer in ('head.0', 'head.2', 'pred') for kind in ('weight', 'bias')
]
SUFFIXES = ('.pth', '.safetensors')


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('checkpoint', help='file to read')
    parser.add_argument('out', type=Path, help='file to write, .pth or .safetensors')
    parser.add_argument(
        '--classifier', action='store_true', help='keep the classification head, for mmpretrain'
    )
    parser.add_argument('--ema', action='store_true', help='take the averaged weights')
    parser.add_argument('--arch', help=f'what the file must be: {", ".join(ARCHS)}')
    parser.add_argument(
        '--kernel-size', type=int, nargs='+', metavar='K', help='what the file must have'
    )
    parser.add_argument(
        '--adapt-kernel',
        type=int,
        nargs='+',
        metavar='K',
        help='pad the kernels with zeros to this size (one, or one a stage): same output',
    )
    parser.add_argument('--force', action='store_true', help='replace the file if it is there')
    add_trust_argument(parser)
    args = parser.parse_args(argv)
    if args.out.suffix not in SUFFIXES:
        parser.error(f'the output must end with {" or ".join(SUFFIXES)}, got {args.out}')
    guard_checkpoints(args)
    try:
        convert(args)
    except (ValueError, OSError) as error:
        raise SystemExit(f'error: {error}') from None


def convert(args: argparse.Namespace) -> None:
    """Reads, checks, reports and writes.

    Raises:
        ValueError, OSError: See `read_state_dict`, `check_expectations`, `check_fit`, `write`.
    """
    state_dict = read_state_dict(args.checkpoint, averaged=args.ema)
    prefix = find_prefix(state_dict, [FIRST_KERNEL])
    head_prefix = find_prefix(state_dict, HEAD_NAMES)
    head = {
        name: state_dict[head_prefix + name]
        for name in HEAD_NAMES
        if head_prefix + name in state_dict
    }
    found = behind_prefix(state_dict, prefix)
    architecture = recognise_arch(found | head)
    if not architecture.depths:
        raise CheckpointError(
            f'{args.checkpoint} is no Conv2Former: it has no {FIRST_KERNEL}; its names begin with '
            f'{sorted({name.split(".")[0] for name in state_dict})}'
        )
    print(f'read      {args.checkpoint}: {len(state_dict)} tensors')
    print(f'found     {describe(architecture)}')
    try:
        check_expectations(architecture, args.arch, args.kernel_size)
        kernel_size = architecture.kernel_size
        if args.adapt_kernel:
            kernel_size = expand(args.adapt_kernel, len(architecture.depths))
        expected = empty_state_dict(architecture, kernel_size)
        if not args.classifier:
            expected |= {n: found[n] for n in found if NEW_FOR_DENSE_PREDICTION.fullmatch(n)}
        check_fit(pad_kernels(found, expected), expected)
        if args.classifier and len(head) < len(HEAD_NAMES):
            missing = [name for name in HEAD_NAMES if name not in head]
            raise CheckpointError(f'--classifier: the classification head lacks {missing}')
    except CheckpointError as error:
        raise CheckpointError(f'{args.checkpoint}: {error}') from error

    used = {prefix + name for name in expected}
    if args.classifier:
        used |= {head_prefix + name for name in head}
    dropped = Counter(name.split('.')[0] for name in state_dict if name not in used)
    found = pad_kernels(found, expected)
    weights = {name: found[name] for name in expected}
    if args.classifier:
        weights = in_whole_model(weights | head)
    count = sum(value.numel() for value in weights.values())
    print(f'used      {len(weights)} tensors, {count / 1e6:.2f} M numbers; missing: none')
    print(f'dropped   {", ".join(f"{n} of {part}" for part, n in dropped.items()) or "none"}')
    if kernel_size != architecture.kernel_size:
        print(f'padded    kernels to {shorten(kernel_size)}')

    meta = asdict(architecture) | {'kernel_size': kernel_size}
    path = write(weights, meta, args.out, args.force)
    print(f'wrote     {path} ({path.stat().st_size / 1e6:.1f} MB)')
    if args.classifier:
        print(f'use it    python tools/test.py CONFIG {path}')
    else:
        print(f'use it    --cfg-options model.backbone.init_cfg.checkpoint={path}')


def check_expectations(
    architecture: Architecture, arch: str | None, kernel_size: Sequence[int] | None
) -> None:
    """Compares with what the user says the file is.

    Raises:
        CheckpointError: It is another network.
        ValueError: `arch` or `kernel_size` is none that there is.
    """
    if arch is not None:
        named = parse_arch(arch, ARCHS, ARCH_LETTERS)
        if (named.channels, named.depths) != (architecture.channels, architecture.depths):
            raise CheckpointError(f'--arch {arch} was expected, found {describe(architecture)}')
    if kernel_size is not None:
        wanted = expand(kernel_size, len(architecture.depths))
        if wanted != architecture.kernel_size:
            raise CheckpointError(
                f'--kernel-size {shorten(wanted)} was expected, '
                f'found {shorten(architecture.kernel_size)}'
            )


def expand(kernel_size: Sequence[int], num_stages: int) -> tuple[int, ...]:
    """One kernel size a stage, from one or as many numbers."""
    return parse_kernel_size(kernel_size[0] if len(kernel_size) == 1 else kernel_size, num_stages)


def shorten(kernel_size: tuple[int, ...]) -> int | tuple[int, ...]:
    """One number where all stages have the same."""
    return kernel_size[0] if len(set(kernel_size)) == 1 else kernel_size


def describe(architecture: Architecture) -> str:
    """An architecture in words, by its name if it has one."""
    names = [
        name
        for name, arch in ARCHS.items()
        if (arch.channels, arch.depths) == (architecture.channels, architecture.depths)
    ]
    parts = [
        f'arch {names[0] if names else "of no name"}',
        f'kernel_size {shorten(architecture.kernel_size)}',
        f'channels {architecture.channels}',
        f'depths {architecture.depths}',
        f'mlp_ratio {architecture.mlp_ratio:g}' if architecture.mlp_ratio else 'no feed-forward',
        f'{architecture.num_classes} classes' if architecture.num_classes else 'no head',
    ]
    return ', '.join(parts)


def empty_state_dict(architecture: Architecture, kernel_size: tuple[int, ...]) -> dict[str, Tensor]:
    """Names and shapes of the whole backbone, without memory."""
    with torch.device('meta'):
        backbone = Conv2Former(
            dict(channels=architecture.channels, depths=architecture.depths),
            in_channels=architecture.in_channels or 3,
            kernel_size=kernel_size,
            mlp_ratio=architecture.mlp_ratio or 4,
            out_indices=range(len(architecture.depths)),
            out_norm=False,
        )
    return dict(backbone.state_dict())


def write(weights: dict[str, Tensor], meta: dict, out: Path, force: bool) -> Path:
    """Writes a file wholly or not at all, with its checksum in the name.

    Args:
        weights: Names and tensors.
        meta: What a `.pth` says beside them.
        out: `DIR/NAME.SUFFIX`; what is written is `DIR/NAME-XXXXXXXX.SUFFIX`.
        force: Whether a file of this name is replaced.

    Raises:
        FileExistsError: There is one and `force` is not set.
        OSError: The folder is not writable, or the disk is full.
    """
    # Storages of their own: a view would take all that it is a part of into the file.
    weights = {
        name: value.detach().clone(memory_format=torch.contiguous_format)
        for name, value in weights.items()
    }
    partial = out.with_name(f'.{out.name}.{os.getpid()}.partial')
    try:
        write_content(partial, weights, meta, out.suffix)
        path = out.with_name(f'{out.stem}-{sha256(partial)[:8]}{out.suffix}')
        if path.exists() and not force:
            raise FileExistsError(f'{path} exists already; --force replaces it')
        os.replace(partial, path)
    finally:
        if partial.is_file():
            partial.unlink()
    return path


def write_content(path: Path, weights: dict[str, Tensor], meta: dict, suffix: str) -> None:
    """Writes the file itself, in the form that the suffix says.

    Raises:
        OSError: The folder is not writable, or the disk is full.
        CheckpointError: See `to_safetensors`.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open('xb') as file:
            if suffix == '.safetensors':
                file.write(to_safetensors(weights))
            else:
                # Into a file object: the bytes, hence the checksum, do not depend on its name.
                torch.save(dict(meta=meta, state_dict=weights), file)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise OSError(f'cannot write into {path.parent}: {error}') from error


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


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open('rb') as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


if __name__ == '__main__':
    main()
