"""Writes the tables of README and docs from the metafiles and docs/evidence.json.

    python tools/make_tables.py

Each table is between `<!-- table NAME -->` and `<!-- end -->`; the text between them is replaced.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import yaml
from common import parser_of
from common.tables import table, with_table
from mmengine.config import Config

from mmconv2former.models.baselines import BASELINES as TABLE

ROOT = Path(__file__).resolve().parents[1]
EVIDENCE = ROOT / 'docs/evidence.json'
PAGES = [
    ROOT / name
    for name in ('README.md', 'docs/model_zoo.md', 'docs/baselines.md', 'docs/public_data.md')
]
# The keys in evidence.json that are not recipes: whole models of others, and backbones.
BASELINES = 'baselines'
BACKBONES = 'backbones'
PUBLIC = 'public_test'  # of a recipe: its runs on a public dataset


class Published(NamedTuple):
    """Numbers on ImageNet-1K; millions of parameters and billions of multiply-adds."""

    parameters: float
    flops: float
    top1: float | None
    size: int = 224


# From arXiv 2211.11943, nano from the official repository.
OURS = {
    'conv2former_nano': Published(15, 2.2, 81.5),
    'conv2former_tiny': Published(27, 4.4, 83.2),
    'conv2former_small': Published(50, 8.7, 84.1),
    'conv2former_base': Published(90, 15.9, 84.4),
    'conv2former_large': Published(199, 36.0, None),
}

DENSE = ('detection', 'segmentation')

# From least to most: what a recipe has shown on this project's machines.
LEVELS = (
    'builds',
    'steps on real data',
    'fits real data',
    'fits at full size on a GPU',
    'tested on a public test split',
    'trained to the published number',
)
LEAST_IMAGES = 8  # minimum for the level of a fit at full size


def main() -> None:
    parser_of(__doc__).parse_args()
    write_tables()


def write_tables(dry_run: bool = False) -> list[str]:
    """Updates the pages and returns the names of those that were out of date."""
    evidence = read_evidence(EVIDENCE)
    tables = {
        'recipes': zoo_table(evidence, DENSE, with_public=False),
        'detection': zoo_table(evidence, ['detection'], with_memory=True),
        'segmentation': zoo_table(evidence, ['segmentation'], with_memory=True),
        'classification': zoo_table(evidence, ['classification']),
        'ablations': ablation_table(evidence),
        'evidence': evidence_table(evidence),
        'counter': counter_table(evidence),
        'backbones': backbone_table(evidence),
        'backbones in dense prediction': dense_backbone_table(evidence),
        'public test splits': public_table(evidence),
        **{f'classes of {name}': class_table(evidence, name) for name in PUBLIC_METRICS},
    }
    outdated = []
    for page in PAGES:
        old = new = page.read_text()
        for name, content in tables.items():
            new = with_table(new, name, content)
        if new != old:
            outdated.append(page.name)
            if not dry_run:
                page.write_text(new)
    return outdated


# ----------------------------------------------------------------------------------------- inputs
def metafiles() -> list[Path]:
    index = yaml.safe_load((ROOT / 'model-index.yml').read_text())
    return [ROOT / path for path in index['Import']]


def models() -> list[dict]:
    """The entries of all metafiles."""
    return [model for path in metafiles() for model in yaml.safe_load(path.read_text())['Models']]


def recipes() -> dict[str, Path]:
    """Config files by the recipe's name, in the order of the metafiles."""
    return {model['Name']: ROOT / model['Config'] for model in models()}


def task(config: Path) -> str:
    """'detection', 'segmentation', 'classification' or 'ablations' (of classification)."""
    return config.parent.name


def is_on_public_data(config: Path) -> bool:
    """Whether a recipe is for a dataset of docs/public_data.md."""
    return config.stem.split('_')[-1] in PUBLIC_METRICS


def read_evidence(path: Path) -> dict[str, dict]:
    """What `tools/evidence.py` measured, by recipe."""
    return json.loads(path.read_text()) if path.exists() else {}


def level(record: dict) -> str:
    """The evidence level of a recipe."""
    if record.get(PUBLIC):
        return LEVELS[4]
    on_gpu = [result for result in record.get('true_size', {}).values() if is_on_gpu(result)]
    if any(fits(result) and result['images'] >= LEAST_IMAGES for result in on_gpu):
        return LEVELS[3]
    if 'fit' in record and fits(record['fit']):
        return LEVELS[2]
    return LEVELS[1] if 'steps' in record else LEVELS[0]


def fits(result: dict) -> bool:
    """Whether a fit has reached its goal."""
    return result['metrics'][result['metric']] >= result['goal']


def is_on_gpu(result: dict) -> bool:
    return result['device'] == 'cuda'


# ---------------------------------------------------------------------------------------- recipes
def zoo_table(
    evidence: dict[str, dict],
    tasks: Collection[str],
    with_memory: bool = False,
    with_public: bool = True,
) -> str:
    """Size, cost, published number and status of the recipes of some tasks."""
    header = ['recipe', 'backbone from', 'parameters', 'FLOPs', 'published', 'shown here']
    if with_memory:
        header[4:4] = ['kept by the backbone', 'with `with_cp`']
    rows = []
    for model in models():
        config = Path(model['Config'])
        if task(config) not in tasks or (is_on_public_data(config) and not with_public):
            continue
        record = evidence.get(model['Name'], {})
        row = [
            link(model),
            model['Metadata']['Pretraining'],
            *cost_cells(record.get('cost')),
            published_cell(model, with_metric=True),
            level(record),
        ]
        if with_memory:
            row[4:4] = memory_cells(record.get('cost'))
        rows.append(row)
    return table(header, rows)


def ablation_table(evidence: dict[str, dict]) -> str:
    """The ablations beside the networks that they vary."""
    rows = []
    for model in models():
        is_base = model['Name'] in ('conv2former_t_in1k', 'conv2former_b_in1k')
        if not is_base and task(Path(model['Config'])) != 'ablations':
            continue
        record = evidence.get(model['Name'], {})
        backbone = Config.fromfile(ROOT / model['Config']).model.backbone
        kernel, fusion = backbone.get('kernel_size', 11), backbone.get('fusion', 'hadamard')
        row = [
            link(model),
            backbone.arch,
            f'{kernel}x{kernel}',
            fusion,
            *cost_cells(record.get('cost')),
            published_cell(model),
            level(record),
        ]
        rows.append(((backbone.arch, fusion != 'hadamard', kernel), row))
    rows.sort(key=lambda item: item[0])
    header = ['recipe', 'arch', 'kernel', 'fusion', 'parameters', 'FLOPs', 'published top-1']
    return table([*header, 'shown here'], [row for _, row in rows])


def evidence_table(evidence: dict[str, dict]) -> str:
    """The results of every run of the recipes."""
    rows = []
    for name in recipes():
        record = evidence.get(name, {})
        runs = [(sample, result) for sample, result in record.get('steps', {}).items()]
        if 'fit' in record:
            runs.append((f'fits {record["fit"]["images"]} images', record['fit']))
        runs += [
            (f'fits {label}, [full size, {result["machine"]}]({result["log"]})', result)
            for label, result in record.get('true_size', {}).items()
            if is_on_gpu(result)
        ]
        for what, result in runs:
            metrics = ', '.join(
                f'{key.split("/")[-1]} {value:g}' for key, value in result['metrics'].items()
            )
            losses = f'{result["first_loss"]:.2f} → {result["last_loss"]:.2f}'
            minutes = f'{result["seconds"] / 60:.1f} min'
            rows.append([name, what, str(result['iterations']), losses, metrics, minutes])
    header = ['recipe', 'data', 'iterations', 'loss', 'evaluation', 'training time']
    return table(header, rows)


def counter_table(evidence: dict[str, dict]) -> str:
    """Other authors' models, whose published FLOPs show that we count in the same way."""
    rows = [
        [
            name,
            '{}x{}'.format(*record['cost']['size']),
            *cost_cells(record['cost']),
            f'{record["published_gflops"]:,} G',
        ]
        for name, record in evidence.get(BASELINES, {}).items()
    ]
    return table(['model', 'input', 'parameters', 'FLOPs, counted', 'FLOPs, published'], rows)


def link(model: dict) -> str:
    return f'[`{model["Name"]}`](/{model["Config"]})'


def published_cell(model: dict, with_metric: bool = False) -> str:
    published = model['Published']
    if published is None:
        return 'not found'
    return f'{published["Value"]} {published["Metric"]}' if with_metric else f'{published["Value"]}'


def cost_cells(cost: dict | None, digits: int = 1) -> list[str]:
    if cost is None:
        return ['', '']
    flops = cost['flops'] / 1e9
    return [f'{cost["parameters"] / 1e6:.1f} M', f'{flops:,.{digits if flops < 200 else 0}f} G']


def memory_cells(cost: dict | None) -> list[str]:
    if cost is None:
        return ['', '']
    return [f'{cost["kept"][key] / 2**30:.1f} GiB' for key in ('default', 'with_cp')]


# ------------------------------------------------------------------------------------ public data
# Metrics of the test split by dataset: the factor to percent, and what names the classes' own.
PUBLIC_METRICS = {
    'bccd': ({'coco/bbox_mAP': 'AP', 'coco/bbox_mAP_50': 'AP50'}, 100, r'coco/(.+)_precision'),
    'camvid': ({'mIoU': 'mIoU', 'aAcc': 'pixel accuracy'}, 1, r'IoU/(.+)'),
}


def public_runs(evidence: dict[str, dict], dataset: str) -> dict[tuple[str, str], list[dict]]:
    """The runs on a dataset by recipe and name; those of a group differ in the seed."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for recipe, record in evidence.items():
        for label, result in record.get(PUBLIC, {}).items():
            if result['dataset'] == dataset:
                name = re.sub(r', seed \d+', '', label)
                groups.setdefault((recipe, name), []).append(result)
    return groups


def public_table(evidence: dict[str, dict]) -> str:
    """Results on public test splits: mean and spread over the seeds."""
    rows = []
    for dataset, (metrics, factor, _) in PUBLIC_METRICS.items():
        for (recipe, name), results in public_runs(evidence, dataset).items():
            untrained = [one['untrained'] for one in results if one['untrained']]
            what = f'{results[0]["backbone"]}, untrained'
            minutes = sorted({round(one['seconds'] / 60) for one in results})
            for label, tested, time in (
                (name, [one['metrics'] for one in results], f'{range_of(minutes)} min'),
                (what, untrained, ''),
            ):
                if not tested:
                    continue
                cells = [
                    mean_and_spread([factor * one.get(key, 0.0) for one in tested])
                    for key in metrics
                ]
                parameters = f'{results[0]["parameters"] / 1e6:.1f} M'
                flops = f'{results[0]["backbone_flops"] / 1e9:.2f} G'
                seeds = str(len(tested))
                rows.append([f'`{recipe}`', label, parameters, flops, seeds, *cells, time])
    header = ['recipe', 'backbone', 'parameters', "backbone's FLOPs", 'seeds', 'AP or mIoU']
    return table([*header, 'AP50 or pixel accuracy', 'training'], rows)


def range_of(values: list[int]) -> str:
    """A number, or the first and the last of several."""
    return str(values[0]) if len(values) == 1 else f'{values[0]} to {values[-1]}'


def class_table(evidence: dict[str, dict], dataset: str) -> str:
    """AP or IoU of each class, the mean over the seeds."""
    _, factor, pattern = PUBLIC_METRICS[dataset]
    rows, header = [], ['recipe', 'backbone']
    for (recipe, name), results in public_runs(evidence, dataset).items():
        keys = [key for key in results[0]['metrics'] if re.fullmatch(pattern, key)]
        header = ['recipe', 'backbone', *(re.sub(pattern, r'\1', key) for key in keys)]
        means = (mean(factor * one['metrics'][key] for one in results) for key in keys)
        rows.append([f'`{recipe}`', name, *(f'{value:.1f}' for value in means)])
    return table(header, rows)


def mean_and_spread(values: list[float]) -> str:
    """The mean and, for several values, their standard deviation."""
    text = f'{mean(values):.1f}'
    return text if len(values) == 1 else f'{text} ± {stdev(values):.1f}'


# -------------------------------------------------------------------------------------- backbones
def backbone_names() -> list[str]:
    return [*OURS, *TABLE]


def backbone_table(evidence: dict[str, dict]) -> str:
    """Ours and the baselines on ImageNet, counted and published."""
    rows = []
    for name in backbone_names():
        published = OURS[name] if name in OURS else TABLE[name]
        parameters, flops = cost_cells(cost_of(evidence, name, 'classification'), digits=2)
        rows.append(
            [
                f'`{name}`',
                'this package' if name in OURS else TABLE[name].family.library,
                f'{published.size}',
                parameters,
                '' if published.parameters is None else f'{published.parameters} M',
                flops,
                f'{published.flops} G',
                '' if published.top1 is None else f'{published.top1}',
                'arXiv 2211.11943' if name in OURS else TABLE[name].family.source,
            ]
        )
    header = ['name', 'built by', 'input', 'parameters', 'published', 'FLOPs', 'published']
    return table([*header, 'top-1, published', 'source'], rows)


def dense_backbone_table(evidence: dict[str, dict]) -> str:
    """Backbones alone and in whole models."""
    kinds = ('dense', 'mask_rcnn', 'upernet')
    costs = {name: [cost_of(evidence, name, kind) for kind in kinds] for name in backbone_names()}
    rows = [
        [f'`{name}`', *(cell for cost in found for cell in cost_cells(cost))]
        for name, found in costs.items()
        if found[0] is not None
    ]
    header = ['backbone', 'parameters', 'FLOPs', 'Mask R-CNN, parameters', 'Mask R-CNN, FLOPs']
    return table([*header, 'UperNet, parameters', 'UperNet, FLOPs'], rows)


def cost_of(evidence: dict[str, dict], name: str, kind: str) -> dict | None:
    """Cost of a backbone, or of a whole model with it: our recipe, or size T's with a baseline."""
    if name in OURS and kind in ('mask_rcnn', 'upernet'):
        size = name.removeprefix('conv2former_')[0]
        return evidence.get(f'{kind}_conv2former_{size}', {}).get('cost')
    return evidence.get(BACKBONES, {}).get(name, {}).get(kind)


if __name__ == '__main__':
    main()
