"""Backbones by a specification such as `conv2former_t:recompute=nothing`, and what they cost.

A specification is a name, with options after a colon:

    conv2former_{n,t,s,b,l}    any argument of Conv2Former, or deploy=True (inference only)
    plain_{n,t,s,b,l}          the published code's operators, in NCHW or with channels_last=True
    convnext_tiny  swin_tiny  hornet_tiny  ...     any of docs/baselines.md, with four outputs
    timm/convnext_tiny  ...    any of timm's that has features

Any of them accepts one of these options for inference:

    cuda_graphs=True           as a CUDA graph (--device cuda)
    compile=True               with torch.compile
    aoti=True                  compiled ahead of time, with torch.export and AOTInductor
    half=True                  weights and images in --dtype, without autocast
"""

from __future__ import annotations

import copy
from ast import literal_eval
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

from common.config_check import in_one_line
from common.counting import count_bytes_kept, count_macs, count_traffic
from common.measuring import (
    DTYPES,
    UNLIMITED,
    Budget,
    Case,
    Cost,
    Setting,
    Size,
    costs_table,
    measure_costs,
)
from common.plain_conv2former import PublishedConv2Former
from mmconv2former import Baseline, Conv2Former, use_cuda_graphs
from mmconv2former.models.baselines import BASELINES

OURS = tuple(f'conv2former_{size}' for size in 'ntsbl')
PLAIN = tuple(f'plain_{size}' for size in 'ntsbl')
TIMM = 'timm/'
DENSE = tuple(name for name, variant in BASELINES.items() if variant.family.dense is not None)
WAYS = ('cuda_graphs', 'compile', 'aoti', 'half')  # to run inference


def parse(spec: str) -> tuple[str, dict[str, Any]]:
    """Name and options of a specification.

    Raises:
        SystemExit: There is no model of this name, or an option has no value.
    """
    name, _, text = spec.partition(':')
    known = (*OURS, *PLAIN, *DENSE)
    if name not in known and not name.startswith(TIMM):
        raise SystemExit(
            f'error: unknown model {name}; choose one of {", ".join(known)}, or timm/NAME'
        )
    options = {}
    for option in filter(None, text.split(',')):
        key, _, value = option.partition('=')
        if not value:
            raise SystemExit(f'error: {spec}: {key} must have a value, as in {key}=True')
        try:
            options[key] = literal_eval(value)
        except (ValueError, SyntaxError):
            options[key] = value  # a word
    return name, options


def ways(spec: str) -> set[str]:
    return {way for way in WAYS if parse(spec)[1].get(way)}


def trains(spec: str) -> bool:
    return not ways(spec) and not parse(spec)[1].get('deploy')


def build(spec: str) -> nn.Module:
    """The network of a specification, without the options for inference."""
    name, options = parse(spec)
    options = {key: value for key, value in options.items() if key not in WAYS}
    if name.startswith(TIMM):
        return timm_features(name, options)
    size = name[-1]
    if name in PLAIN:
        return PublishedConv2Former(Conv2Former(size), **options)
    if name in DENSE:
        return Baseline(name, options=options)
    deploy = options.pop('deploy', False)
    model = Conv2Former(size, layer_scale_init_value=1.0, **options)
    return model.switch_to_deploy() if deploy else model


def timm_features(name: str, options: dict[str, Any]) -> nn.Module:
    """One of timm's networks, with outputs of all its stages.

    Raises:
        SystemExit: timm is not installed, has no such network, or takes no such option.
    """
    try:
        import timm

        return timm.create_model(name.removeprefix(TIMM), features_only=True, **options)
    except Exception as error:  # of any kind, also from the network's own checks
        raise SystemExit(f'error: {name}: {in_one_line(error)}') from error


# ----------------------------------------------------------------------------------------- running
def train_step(model: nn.Module, images: Tensor, setting: Setting) -> None:
    """Forward and backward pass."""
    with setting.autocast():
        loss = sum(output.float().mean() for output in model(images))
    loss.backward()
    model.zero_grad(set_to_none=True)


def training_case(spec: str, setting: Setting) -> Case:
    model = build(spec).to(setting.device).train()

    def forward(images: Tensor) -> object:
        with setting.autocast():
            return model(images)

    return Case(model, partial(train_step, model, setting=setting), forward)


def inference_case(spec: str, setting: Setting) -> Case:
    """A model that runs inference as its specification says; see `check_ways`."""
    model, dtype = build(spec).to(setting.device).eval(), torch.float32
    if 'half' in ways(spec):
        dtype = DTYPES[setting.dtype]
        model.to(dtype)
        setting = replace(setting, dtype='float32')  # no autocast
    forward: Callable[[Tensor], object] = model
    if 'cuda_graphs' in ways(spec):
        use_cuda_graphs(model)
    if 'compile' in ways(spec):
        model.compile()
    if 'aoti' in ways(spec):
        forward = compiled_ahead(model, setting.images().to(dtype), setting)
        setting = replace(setting, dtype='float32')  # the program has autocast's casts
    return Case(model, lambda images: infer(forward, images.to(dtype), setting))


def infer(forward: Callable[[Tensor], object], images: Tensor, setting: Setting) -> object:
    with torch.inference_mode(), setting.autocast():
        return forward(images)


class WithAutocast(nn.Module):
    """A model that turns on autocast itself: torch.export records only that."""

    def __init__(self, model: nn.Module, setting: Setting) -> None:
        super().__init__()
        self.model, self.setting = model, setting

    def forward(self, images: Tensor) -> object:
        with self.setting.autocast():
            return self.model(images)


def compiled_ahead(model: nn.Module, images: Tensor, setting: Setting) -> Callable[[Tensor], Any]:
    """A model as AOTInductor compiles it for images of this size, with the setting's autocast."""
    with torch.no_grad():
        program = torch.export.export(WithAutocast(model, setting), (images,))
    inductor: Any = torch._inductor
    with TemporaryDirectory() as folder:
        path = inductor.aoti_compile_and_package(program, package_path=f'{folder}/model.pt2')
        return inductor.aoti_load_package(path)


def check_ways(specs: Iterable[str], setting: Setting) -> None:
    """Raises SystemExit if the setting does not allow a way to run a model."""
    for spec in specs:
        used = ways(spec)
        if 'cuda_graphs' in used and setting.device != 'cuda':
            raise SystemExit(f'error: {spec}: cuda_graphs needs --device cuda')
        if 'half' in used and setting.dtype == 'float32':
            raise SystemExit(f'error: {spec}: half needs --dtype bfloat16 or float16')
        if len(used - {'half'}) > 1:
            raise SystemExit(f'error: {spec}: choose one of cuda_graphs, compile and aoti')


def measure_models(
    specs: Iterable[str],
    training: bool,
    setting: Setting,
    rounds: int,
    budget: Budget = UNLIMITED,
    new_sizes: Sequence[Size] = (),
) -> dict[str, Cost]:
    """Costs of a training step, or of inference; see `measure_costs`.

    Specifications for inference only are left out of training.
    """
    make_case = training_case if training else inference_case
    cases = {
        spec: partial(make_case, spec, setting) for spec in specs if trains(spec) or not training
    }
    return measure_costs(cases, setting.images, setting, rounds, budget, new_sizes)


def models_table(costs: Mapping[str, Cost], setting: Setting) -> str:
    """`costs_table` with the numbers of weights and multiply-adds."""
    weights = {spec: sum(t.numel() for t in build(spec).state_dict().values()) for spec in costs}
    return costs_table(
        costs,
        {
            'weights': {spec: f'{number / 1e6:.1f} M' for spec, number in weights.items()},
            'multiply-adds': {spec: f'{macs(spec, setting) / 1e9:.1f} G' for spec in costs},
        },
    )


# ---------------------------------------------------------------------------------------- counting
@contextmanager
def without_values(spec: str, setting: Setting) -> Iterator[tuple[nn.Module, Tensor]]:
    """A model and images as fake tensors, which make counting fast at any size."""
    mode = FakeTensorMode()
    with FakeCopyMode(mode):
        model = copy.deepcopy(build(spec).to(setting.device))
    with mode:
        yield model, torch.empty(setting.batch, 3, *setting.size, device=setting.device)


def macs(spec: str, setting: Setting) -> int:
    """Multiply-adds of a forward pass."""
    with without_values(spec, setting) as (model, images):
        return count_macs(model.eval(), images)


def bytes_kept(spec: str, setting: Setting) -> int:
    """Bytes that autograd keeps between forward and backward pass."""
    with without_values(spec, setting) as (model, images), setting.autocast():
        return count_bytes_kept(model.train(), images)


def traffic(spec: str, setting: Setting, training: bool) -> tuple[int, int]:
    """Launches, and bytes read and written, of a training step or of inference on a GPU."""
    with without_values(spec, setting) as (model, images):
        run = train_step if training else infer
        return count_traffic(partial(run, model.train(training), images, setting))
