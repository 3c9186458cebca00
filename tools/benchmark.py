"""Compares backbones: time, memory, operators, arithmetic.

    python tools/benchmark.py                           # ours against the published code
    python tools/benchmark.py --device cuda --report DIR   # everything, in 4 minutes on a GPU
    python tools/benchmark.py conv2former_t convnext_tiny swin_tiny --size 800 1280
    python tools/benchmark.py conv2former_t:recompute=expansion plain_t --dtype bfloat16
    python tools/benchmark.py conv2former_t convnext_tiny:cuda_graphs=True --only inference
    python tools/benchmark.py --count                   # launches and bytes moved on a GPU, counted
    python tools/benchmark.py conv2former_t deit3_small --sweep resolution
    python tools/benchmark.py conv2former_t --sweep kernel
    make bench                                          # the first, three runs, stored in the docs

{specs}

Models run in turn, once per round. Their ratios therefore hold on a noisy machine too, while times
of two runs cannot be compared. docs/performance.md explains the columns. --report measures the
depthwise convolution, backbones and whole recipes, and writes its files after each part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import common  # before torch
from benchmark_report import FULL, QUICK, write_report
from common import model_specs
from common.measuring import Cost, Setting, add_setting_arguments, asked, machine
from common.model_specs import (
    bytes_kept,
    check_ways,
    macs,
    measure_models,
    models_table,
    traffic,
    trains,
)
from common.tables import show, table

DOCS = Path(__file__).resolve().parents[1] / 'docs'
PAGES = (DOCS / 'performance.md', DOCS / 'data/benchmarks.md')

PUBLISHED = ('plain_t', 'plain_t:channels_last=True')  # the better one of a run counts
RIVAL = 'convnext_tiny'
DEFAULT, FASTEST, SMALLEST, CHECKPOINTED, DEPLOYED = OURS = (
    'conv2former_t',
    'conv2former_t:recompute=nothing',
    'conv2former_t:recompute=expansion',
    'conv2former_t:with_cp=True',
    'conv2former_t:deploy=True',
)


def main() -> None:
    specs = model_specs.__doc__.partition('\n\n')[2].strip()
    parser = common.parser_of(__doc__.format(specs=specs))
    parser.add_argument(
        'models', nargs='*', metavar='MODEL', help='models to compare (default: a selection)'
    )
    add_setting_arguments(parser, rounds=7)
    parser.add_argument(
        '--only', choices=['training', 'inference'], help='measure only one of them'
    )
    parser.add_argument(
        '--count', action='store_true', help='count launches and bytes instead of measuring'
    )
    parser.add_argument(
        '--sweep', choices=['resolution', 'kernel'], help='measure inference over several sizes'
    )
    parser.add_argument(
        '--runs', type=int, default=1, help='number of runs for the ratios to the published code'
    )
    parser.add_argument(
        '--page', action='store_true', help='store the table in docs/performance.md or docs/data'
    )
    parser.add_argument(
        '--report', type=Path, metavar='DIR', help='measure everything and write a report to DIR'
    )
    parser.add_argument(
        '--budget', type=float, default=240, help='time limit of --report in seconds (default: 240)'
    )
    parser.add_argument(
        '--quick', action='store_true', help='make --report use tiny sizes, for a trial run'
    )
    args = parser.parse_args()
    pages = PAGES if args.page else ()

    if args.report:
        plan = QUICK if args.quick else FULL
        models = tuple(args.models) or plan.models
        setting = replace(plan.setting, **asked(args))
        plan = replace(plan, models=models, setting=setting, rounds=args.rounds)
        write_report(args.report, plan, args.budget)
    elif args.count:
        setting = replace(Setting((800, 1280), dtype='bfloat16'), **asked(args))
        text = count_table(args.models or [PUBLISHED[0], *OURS, RIVAL], setting)
        show('count', f'{setting}, counted\n\n{text}', pages)
    elif args.sweep:
        setting = replace(Setting((224, 224)), **asked(args))
        text = sweep(args.models or [DEFAULT], args.sweep, setting, args.rounds)
        show(f'sweep {args.sweep}', f'{machine(setting.device)}; {setting}\n\n{text}', pages)
    else:
        setting = replace(Setting((512, 512)), **asked(args))
        title = f'{machine(setting.device)}; {setting}; medians of {args.rounds} rounds\n'
        if args.models:
            kinds = [args.only] if args.only else ['training', 'inference']
            costs = measure(args.models, setting, args.rounds, kinds)
            show(f'models {setting.dtype}', title + tables(costs, setting), pages)
        else:
            memory = replace(Setting((800, 1280)), **asked(args))
            text, costs = compare(setting, memory, args.rounds, args.runs)
            show('ratios', f'{title}\n{text}', pages)
            show('last run', title + tables(costs, setting), pages)


def measure(
    specs: Sequence[str], setting: Setting, rounds: int, kinds: Sequence[str]
) -> dict[str, dict[str, Cost]]:
    """Costs by kind ('training' or 'inference') and model."""
    check_ways(specs, setting)
    return {kind: measure_models(specs, kind == 'training', setting, rounds) for kind in kinds}


def tables(costs: dict[str, dict[str, Cost]], setting: Setting) -> str:
    """A table for each kind that was measured."""
    titles = {'training': 'Training step (forward and backward)', 'inference': 'Inference'}
    return ''.join(
        f'\n{titles[kind]}:\n\n{models_table(found, setting)}'
        for kind, found in costs.items()
        if found
    )


# ---------------------------------------------------------------------- against the published code
COMPARED = {
    'kept for backward': (DEFAULT, SMALLEST, CHECKPOINTED),
    'training': (DEFAULT, FASTEST, SMALLEST, CHECKPOINTED),
    'inference': (DEPLOYED,),
}


def compare(
    speed: Setting, memory: Setting, rounds: int, runs: int
) -> tuple[str, dict[str, dict[str, Cost]]]:
    """Ratios of ours to the published code and to ConvNeXt-T, and the costs of the last run.

    Args:
        speed: The setting of times.
        memory: The setting of the bytes kept.
        rounds: Rounds of each run.
        runs: Ratios of times are listed run by run.
    """
    trained = [*PUBLISHED, *COMPARED['training'], RIVAL]
    kept = {spec: float(bytes_kept(spec, memory)) for spec in trained}
    found = []
    for _ in range(runs):
        costs = measure(trained, speed, rounds, ['training'])
        costs |= measure([*PUBLISHED, DEFAULT, DEPLOYED, RIVAL], speed, rounds, ['inference'])
        found.append({kind: medians(of_kind) for kind, of_kind in costs.items()})
        found[-1]['kept for backward'] = kept
    rows = []
    for kind, specs in COMPARED.items():
        setting = memory if kind == 'kept for backward' else speed
        for spec in specs:
            pairs = [
                (run[kind][spec] / min(run[kind][name] for name in PUBLISHED),
                 run[kind][spec] / run[kind][RIVAL])
                for run in found
            ]  # fmt: skip
            ratios = (
                ', '.join(f'{r:.2f}' for r in dict.fromkeys(column)) for column in zip(*pairs)
            )
            rows.append([f'{kind}, {setting}', f'`{spec}`', *ratios])
    header = ['measure', 'model', f'of the published code, {runs} runs', 'of ConvNeXt-T']
    return table(header, rows), costs


def medians(costs: dict[str, Cost]) -> dict[str, float]:
    """Seconds by model; raises SystemExit if one could not be measured."""
    seconds = {}
    for spec, cost in costs.items():
        if cost.median is None:
            raise SystemExit(f'error: {spec}: {cost.error}')
        seconds[spec] = cost.median
    return seconds


# ------------------------------------------------------------------------------- counts and sweeps
def count_table(specs: Sequence[str], setting: Setting) -> str:
    """Launches and bytes moved, with their ratios to the first model in brackets."""
    rows = []
    first: dict[bool, tuple[int, int]] = {}
    for spec in specs:
        row = [f'`{spec}`']
        for training in (True, False):
            if training and not trains(spec):
                row += ['', '']
                continue
            launches, moved = traffic(spec, setting, training)
            first_launches, first_moved = first.setdefault(training, (launches, moved))
            row.append(f'{launches:,} ({launches / first_launches:.2f})')
            row.append(f'{moved / 2**30:.1f} ({moved / first_moved:.2f})')
        rows.append(row)
    header = ['model', 'training: operators', 'GiB moved', 'inference: operators', 'GiB moved']
    return table(header, rows)


SWEPT = {'resolution': (224, 320, 448, 640, 896), 'kernel': (5, 7, 11, 15, 21, 31)}


def sweep(specs: Sequence[str], kind: str, setting: Setting, rounds: int) -> str:
    """Inference over resolutions, or over kernel sizes at the size of the setting."""
    rows: dict[str, list[list[str]]] = {spec: [] for spec in specs}
    for value in SWEPT[kind]:
        names = list(specs)
        if kind == 'resolution':
            setting = replace(setting, size=(value, value))
        else:
            names = [f'{spec}{"," if ":" in spec else ":"}kernel_size={value}' for spec in specs]
        pixels = setting.batch * setting.size[0] * setting.size[1]
        times = medians(measure(names, setting, rounds, ['inference'])['inference'])
        for spec, (name, seconds) in zip(specs, times.items()):
            rows[spec].append(
                [f'`{spec}`', str(value), f'{macs(name, setting) / 1e9:.1f} G',
                 f'{1e3 * seconds:.0f}', f'{1e9 * seconds / pixels:.0f}']
            )  # fmt: skip
    header = ['model', kind, 'multiply-adds', 'inference, ms', 'ns per pixel']
    return table(header, [row for spec in specs for row in rows[spec]])


if __name__ == '__main__':
    main()
