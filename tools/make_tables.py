"""Writes the tables of README and docs from the metafiles and docs/evidence.json.

    python tools/make_tables.py            # write
    python tools/make_tables.py --check    # only say whether they are up to date

A table stands between `<!-- table NAME -->` and `<!-- end -->`; what is between is replaced.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection
from pathlib import Path

import yaml
from common.tables import table, with_table
from mmengine.config import Config

from mmconv2former.models.baselines import BASELINES as TABLE
from mmconv2former.models.baselines import Published

ROOT = Path(__file__).resolve().parents[1]
EVIDENCE = ROOT / 'docs/evidence.json'
PAGES = [
    ROOT / 'README.md',
    *(ROOT / f'docs/{name}.md' for name in ('recipes', 'classification', 'baselines')),
]
# The keys in evidence.json that are no recipes: whole models of others, and backbones.
BASELINES = 'baselines'
BACKBONES = 'backbones'

# From arXiv 2211.11943, nano from the official repository.
OURS = {
    'conv2former_nano': Published(15, 2.2, 81.5),
    'conv2former_tiny': Published(27, 4.4, 83.2),
    'conv2former_small': Published(50, 8.7, 84.1),
    'conv2former_base': Published(90, 15.9, 84.4),
    'conv2former_large': Published(199, 36.0, None),
}

DENSE = ('detection', 'segmentation')

# From least to most; what a recipe has shown on a machine of this project.
LEVELS = (
    'builds',
    'steps on real data',
    'fits real data',
    'fits at full size on a GPU',
    'trained to the published number',
)
LEAST_IMAGES = 8  # that a fit at full size must have for its level


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--check', action='store_true', help='write nothing, fail if out of date')
    args = parser.parse_args()
    outdated = write_tables(dry_run=args.check)
    if args.check and outdated:
        raise SystemExit(f'out of date: {", ".join(outdated)}; run python tools/make_tables.py')


def write_tables(dry_run: bool = False) -> list[str]:
    """Brings the pages up to date and returns the names of those that were not."""
    evidence = read_evidence(EVIDENCE)
    tables = {
        'recipes': recipe_table(evidence, DENSE),
        'classification': recipe_table(evidence, ['classification']),
        'ablations': ablation_table(evidence),
        'evidence': evidence_table(evidence, DENSE),
        'true size': true_size_table(evidence, DENSE),
        'classification evidence': evidence_table(evidence, ['classification', 'ablations']),
        'cost': cost_table(evidence),
        'backbones': backbone_table(evidence),
        'backbones in dense prediction': dense_backbone_table(evidence),
    }
    outdated = []
    for page in PAGES:
        old = page.read_text()
        new = old
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


def recipes(tasks: Collection[str] | None = None) -> dict[str, Path]:
    """Config files by the recipe's name, in the order of the metafiles; of all tasks or some."""
    configs = {model['Name']: ROOT / model['Config'] for model in models()}
    return {
        name: config for name, config in configs.items() if tasks is None or task(config) in tasks
    }


def task(config: Path) -> str:
    """'detection', 'segmentation', 'classification' or 'ablations' (of the second)."""
    return config.parent.name


def read_evidence(path: Path) -> dict[str, dict]:
    """What `tools/evidence.py` measured, by recipe."""
    return json.loads(path.read_text()) if path.exists() else {}


def level(record: dict) -> str:
    """The evidence level of a recipe."""
    fit = record.get('fit')
    if any(fits(found) and found['images'] >= LEAST_IMAGES for found in on_gpu(record).values()):
        return LEVELS[3]
    if fit and fits(fit):
        return LEVELS[2]
    return LEVELS[1] if 'steps' in record else LEVELS[0]


def fits(result: dict) -> bool:
    """Whether a fit has reached the value that counts."""
    return result['metrics'][result['metric']] >= result['goal']


def on_gpu(record: dict) -> dict[str, dict]:
    """Fits of a recipe at its own size that ran on a GPU, by sample and number of images."""
    found = record.get('true_size', {})
    return {
        label: result
        for label, result in found.items()
        if result['device'] == 'cuda' and not result['quick']
    }


def recipe_table(evidence: dict[str, dict], tasks: Collection[str]) -> str:
    """Size, cost, published number and what was shown, of the recipes of some tasks."""
    rows = []
    for model in models():
        if task(ROOT / model['Config']) not in tasks:
            continue
        record = evidence.get(model['Name'], {})
        published = model['Published']
        rows.append(
            [
                f'[`{model["Name"]}`](/{model["Config"]})',
                model['Metadata']['Pretraining'],
                *cost_cells(record.get('cost')),
                f'{published["Value"]} {published["Metric"]}' if published else 'not found',
                level(record),
            ]
        )
    header = ['recipe', 'backbone from', 'parameters', 'FLOPs', 'published', 'shown here']
    return table(header, rows)


def ablation_table(evidence: dict[str, dict]) -> str:
    """The studies beside the networks that they vary."""
    rows = []
    for model in models():
        is_base = model['Name'] in ('conv2former_t_in1k', 'conv2former_b_in1k')
        if not is_base and task(ROOT / model['Config']) != 'ablations':
            continue
        record = evidence.get(model['Name'], {})
        backbone = Config.fromfile(ROOT / model['Config']).model.backbone
        kernel_size = backbone.get('kernel_size', 11)
        published = model['Published']
        rows.append(
            [
                f'[`{model["Name"]}`](/{model["Config"]})',
                backbone.arch,
                f'{kernel_size}x{kernel_size}',
                backbone.get('fusion', 'hadamard'),
                *cost_cells(record.get('cost')),
                f'{published["Value"]}' if published else 'not found',
                level(record),
            ]
        )
    rows.sort(key=lambda row: (row[1], row[3] != 'hadamard', int(row[2].split('x')[0])))
    header = ['recipe', 'arch', 'kernel', 'fusion', 'parameters', 'FLOPs', 'published top-1']
    return table([*header, 'shown here'], rows)


def cost_cells(cost: dict | None) -> list[str]:
    if cost is None:
        return ['', '']
    flops = cost['flops'] / 1e9
    return [f'{cost["parameters"] / 1e6:.1f} M', f'{flops:,.{1 if flops < 200 else 0}f} G']


def evidence_table(evidence: dict[str, dict], tasks: Collection[str]) -> str:
    """What each run of the recipes of some tasks has printed."""
    rows = []
    for name in recipes(tasks):
        record = evidence.get(name, {})
        runs = {**record.get('steps', {}), 'fit': record.get('fit')}
        for run, result in runs.items():
            if result is None:
                continue
            what = f'fits {result["images"]} pictures' if run == 'fit' else run
            rows.append([name, what, str(result['iterations']), *outcome_cells(result)])
    header = ['recipe', 'data', 'iterations', 'loss', 'evaluation', 'training time']
    return table(header, rows)


def outcome_cells(result: dict) -> list[str]:
    """First and last loss, metrics and minutes of a run."""
    metrics = ', '.join(
        f'{key.removeprefix("coco/")} {value:g}' for key, value in result['metrics'].items()
    )
    losses = f'{result["first_loss"]:.2f} → {result["last_loss"]:.2f}'
    return [losses, metrics, f'{result["seconds"] / 60:.1f} min']


def true_size_table(evidence: dict[str, dict], tasks: Collection[str]) -> str:
    """Fits at the recipes' own size on a GPU; nothing where there are none."""
    rows = []
    for name in recipes(tasks):
        for label, result in on_gpu(evidence.get(name, {})).items():
            iterations = f'{result["iterations"]} x {result["batch"]}'
            log = f'[{result["machine"]}]({result["log"]})'
            rows.append([name, label, iterations, *outcome_cells(result), log])
    header = ['recipe', 'data', 'iterations x batch', 'loss', 'evaluation', 'training time', 'log']
    return table(header, rows) if rows else ''


def cost_table(evidence: dict[str, dict]) -> str:
    rows = []
    for name, record in evidence.get(BASELINES, {}).items():
        published = f'{record["published_gflops"]:,} G'
        rows.append([name, *size_and_cost(record['cost']), published, '', ''])
    for name in recipes(DENSE):
        cost = evidence.get(name, {}).get('cost')
        if cost is not None:
            kept = [f'{cost["kept"][key] / 2**30:.1f} GiB' for key in ('default', 'with_cp')]
            rows.append([name, *size_and_cost(cost), '', *kept])
    header = ['model', 'input', 'parameters', 'FLOPs, counted', 'FLOPs, published']
    return table([*header, 'kept by the backbone', 'with `with_cp`'], rows)


def backbone_names() -> list[str]:
    return [*OURS, *TABLE]


def backbone_table(evidence: dict[str, dict]) -> str:
    """Ours and the baselines on ImageNet, counted and published."""
    rows = []
    for name in backbone_names():
        cost = evidence.get(BACKBONES, {}).get(name, {}).get('classification')
        published = OURS[name] if name in OURS else TABLE[name].published
        parameters, flops = ('', '') if cost is None else precise_cells(cost)
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


def precise_cells(cost: dict) -> list[str]:
    return [f'{cost["parameters"] / 1e6:.1f} M', f'{cost["flops"] / 1e9:.2f} G']


def dense_backbone_table(evidence: dict[str, dict]) -> str:
    rows = []
    for name in backbone_names():
        record = evidence.get(BACKBONES, {}).get(name, {})
        if 'dense' not in record:
            continue
        rows.append(
            [
                f'`{name}`',
                *cost_cells(record['dense']),
                *cost_cells(whole_model(evidence, name, 'mask_rcnn')),
                *cost_cells(whole_model(evidence, name, 'upernet')),
            ]
        )
    header = ['backbone', 'parameters', 'FLOPs', 'Mask R-CNN, parameters', 'Mask R-CNN, FLOPs']
    return table([*header, 'UperNet, parameters', 'UperNet, FLOPs'], rows)


def whole_model(evidence: dict[str, dict], name: str, kind: str) -> dict | None:
    """Cost of a recipe of ours, or of Conv2Former-T's with a baseline."""
    if name in OURS:
        size = name.removeprefix('conv2former_')[0]
        return evidence.get(f'{kind}_conv2former_{size}', {}).get('cost')
    return evidence[BACKBONES][name].get(kind)


def size_and_cost(cost: dict) -> list[str]:
    return ['{}x{}'.format(*cost['size']), *cost_cells(cost)]


if __name__ == '__main__':
    main()
