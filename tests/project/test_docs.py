"""README and docs: every command is run or parsed by its tool, every link leads somewhere.

Commands of cheap tools run as written, on small stand-ins for data. Others are parsed by the
tool's own parser; their files must exist and their options be in the config. RUN_BY names the test
that runs such a tool, NOT_RUN says why no test does.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import json
import os
import re
import subprocess
import sys
from importlib import metadata

import pytest
import torch
from helpers import ROOT
from helpers.commands import (
    Command,
    flags_of,
    inline_code,
    parse,
    read_commands,
    write_program,
)
from helpers.pages import Block, files_of, read_blocks
from markdown_it import MarkdownIt
from mmengine.config import Config
from mmengine.registry import MODELS
from packaging.requirements import Requirement

from mmconv2former import Conv2Former

DOCS = sorted((ROOT / 'docs').glob('*.md'))
PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *DOCS]
TOOLS = [f'tools/{path.name}' for path in sorted((ROOT / 'tools').glob('*.py'))]
SCRIPTS = [f'tools/{kind}_{what}.sh' for kind in ('dist', 'slurm') for what in ('train', 'test')]

# Run as written in a folder with stand-ins; the options here are appended to make them small.
RUN_HERE = {
    'tools/make_sample.py': '--train 12 --val 6 --size 64',
    'tools/prepare_data.py': '--workers 1',
    'tools/subset_data.py': '--train 2 --val 1',
    'tools/plot_curves.py': '',
    'tools/convert_weights.py': '',
    '<<': '',  # a script within the block
    'export': '',
    'ln': '',
}
RUN_BY = {
    'tools/train.py': 'tools/test_train_and_test.py::test_resumed_run_is_complete',
    'tools/test.py': 'tools/test_train_and_test.py::test_evaluates_draws_and_dumps',
    'tools/visualize.py': 'tools/test_visualize.py::test_receptive_fields_of_several_networks',
    'tools/benchmark.py': 'tools/test_benchmark.py::test_command',
    'tools/benchmark_recipe.py': (
        'tools/test_benchmark_recipe.py::test_whole_recipes_and_their_data'
    ),
    'tools/benchmark_host.py': 'tools/test_benchmark.py::test_host_time',
    'tools/kernel_resources.py': 'ops/test_kernel_resources.py::test_no_kernel_spills',
    'tools/demo.py': 'tools/test_train_and_test.py::test_demo_in_small',
    'tools/export.py': 'tools/test_export.py::test_onnx',
    'tools/predict.py': 'tools/test_predict.py::test_detection',
    'mmconv2former': 'project/test_packaging.py::test_module_lists_and_runs_the_tools',
    'mim': 'project/test_packaging.py::test_mim_runs_trains_and_tests',
    'tools/make_tables.py': 'configs/test_configs.py::test_tables_are_up_to_date',
}
NOT_RUN = {
    'sbatch': 'needs Slurm; tools/slurm_train.sh is run with stand-ins for srun and scontrol',
    'tools/evidence.py': 'hours on real data; its results are in docs/evidence.json',
    'tools/train_public.py': 'hours on real data; test_train_public.py runs it in small',
    'tools/compatibility.py': 'hours, and the space of two environments',
    'tools/benchmark_depthwise.py': 'minutes on an idle machine; its parts are tested',
    'tools/benchmark_pointwise.py': 'needs a GPU; its parts are tested',
    'cd': 'changes the working directory of the user',
    'git': 'downloads',
    'make': 'sets up an environment; the rules behind each target are read with `make -n`',
    'pip': 'downloads; its flags, extras and pins are checked',
    'pre-commit': 'writes into .git; the hooks themselves are run by `make lint`',
    'source': 'changes the shell of the user',
    'pytest': 'runs this; its files are checked',
}
STAND_INS = {
    'CONFIG': 'configs/detection/mask_rcnn_conv2former_t.py',
    'CHECKPOINT': 'checkpoint.pth',
    'DIR': 'data/coco',
    'FILE': 'checkpoint',
    'INPUT': 'photo.jpg',
    'JOB': 'job',
    'NAME': 'name',
    'PARTITION': 'gpu',
    'URL': 'https://example.org/mmconv2former',
    'WORK_DIR': 'work_dirs/demo/train',
}
# Pages whose Python blocks are files that another test writes and runs.
PYTHON_RUN_BY = {
    'custom_dataset.md': 'configs/test_custom_dataset.py',
    'predict.md': 'tools/test_predict.py',
    'use_in_your_config.md': 'configs/test_foreign_configs.py',
}
# Flags of other programs.
OTHER_FLAGS = {
    '--cov',
    '--force-reinstall',
    '--kill-on-bad-exit',
    '--no-deps',
    '--reliability-page',
    '--slow',
}
WRONG = {'optim_wraper.optimizer.lr'}  # shown as an error
RUNNER_KEYS = ('compile', 'sync_bn')  # known to the runner, in no config
RECIPES = [
    'configs/detection/mask_rcnn_conv2former_t.py',
    'configs/detection/cascade_mask_rcnn_conv2former_s.py',
    'configs/segmentation/upernet_conv2former_t.py',
    'configs/classification/conv2former_t_in1k.py',
]


def unique(commands):
    """Commands by what is typed; the first of each."""
    found: dict[str, Command] = {}
    for command in commands:
        found.setdefault(' '.join(command.text.split()), command)
    return list(found.values())


COMMANDS = unique(command for page in PAGES for command in read_commands(page))


def stand_in(text: str) -> str:
    """Replaces the placeholders of a command by something real."""
    names = '|'.join(STAND_INS)
    return re.sub(rf'(?<![\w$\'])({names})\b(?!=)', lambda match: STAND_INS[match[1]], text)


def words_of(command: Command) -> list[str]:
    """The words of a command, with stand-ins."""
    words = Command(command.page, command.line, stand_in(command.text)).words
    unknown = [word for word in words if re.fullmatch('[A-Z][A-Z_]{2,}', word)]
    assert not unknown, f'{command}: what do {unknown} stand for? (STAND_INS)'
    return words


# ------------------------------------------------------------------------------------------- runs
@pytest.fixture(scope='module')
def project(sample, tmp_path_factory):
    """A folder like a clone, with small data, a finished run and the `python` of these tests."""
    folder = tmp_path_factory.mktemp('project')
    for name in ('configs', 'tools', 'constraints.txt', 'setup.py', 'Makefile'):
        (folder / name).symlink_to(ROOT / name)
    (folder / 'docs/images').mkdir(parents=True)
    (folder / 'data').mkdir()
    (folder / 'data/coco').symlink_to(sample / 'coco')
    (folder / 'data/ade').symlink_to(sample / 'ade')
    (folder / 'work_dirs').mkdir()
    (folder / 'work_dirs/pilot').symlink_to('demo/train')
    logs = folder / STAND_INS['WORK_DIR'] / '20250101_000000/vis_data'
    logs.mkdir(parents=True)
    records = [{'loss': 1.0 / step, 'step': step} for step in (1, 2)] + [{'mIoU': 1.0, 'step': 2}]
    (logs / 'scalars.json').write_text('\n'.join(map(json.dumps, records)))
    torch.save({'state_dict': Conv2Former('nano').state_dict()}, folder / 'conv2former_t.pth.tar')
    (folder / 'bin').mkdir()
    write_program(folder / 'bin/python', f'exec {sys.executable} "$@"')
    return folder


def run(project, text, programs='bin'):
    result = subprocess.run(
        ['bash', '-euc', text],
        cwd=project,
        env={
            **os.environ,
            'PATH': f'{project / programs}:{os.environ["PATH"]}',
            'PYTHONPATH': str(ROOT),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert result.returncode == 0, f'{text}\n{result.stdout}'
    return result.stdout


def shown_by(*programs):
    """Parametrizes a test over the commands of some programs, more than their bare names."""
    commands = [c for c in COMMANDS if c.program in programs and (len(c.words) > 1)]
    return pytest.mark.parametrize('command', commands, ids=str)


@shown_by(*RUN_HERE)
def test_cheap_commands_run(command, project):
    run(project, f'{stand_in(command.text).rstrip()} {RUN_HERE[command.program]}'.rstrip())


# --------------------------------------------------------------------------------------- reading
def check_paths(words, page, where=''):
    """Files that a command names exist in the project or are written on the page."""
    written_by_page = files_of(page)
    for word in words:
        if re.match('(configs|docs|tests|tools)/', word):
            path = word.split('::')[0].removesuffix('...')
            on_page = any(name.startswith(path) for name in written_by_page)
            assert on_page or (ROOT / path).exists(), f'{path} is not there {where}'


def check_config(arguments, page):
    """The config has a place for each of `--cfg-options`."""
    files = files_of(page)
    if arguments.config in files or not arguments.config.startswith('configs/'):
        return
    config = Config.fromfile(ROOT / arguments.config)
    for key, _ in arguments.cfg_options:
        assert is_option(config, key), f'{arguments.config} has no place for {key}'


def is_option(config, key):
    """Whether a dotted key is one of the config, or an argument of the backbone."""
    parent, _, name = key.rpartition('.')
    if parent == 'model.backbone':
        return name in inspect.signature(Conv2Former).parameters
    try:
        place = config
        for part in parent.split('.') if parent else []:
            place = place[int(part) if part.isdecimal() else part]
    except (KeyError, IndexError, TypeError):
        return False
    return isinstance(place, dict) if parent else name in config or name in RUNNER_KEYS


@shown_by(*SCRIPTS)
def test_launchers_hand_on_a_command_that_the_tool_reads(command, project, tmp_path):
    for name in ('python', 'srun'):
        write_program(tmp_path / name, f'printf "%s\\n" "$@" >{tmp_path}/words')
    run(project, stand_in(command.text), programs=tmp_path)
    started = (tmp_path / 'words').read_text().splitlines()
    tool = next(i for i, word in enumerate(started) if word in ('tools/train.py', 'tools/test.py'))
    check_paths(started[tool:], command.page)
    check_config(parse(started[tool:]), command.page)


@shown_by(*TOOLS)
def test_tools_read_their_commands(command):
    words = words_of(command)
    check_paths(words, command.page)
    arguments = parse(words)
    if getattr(arguments, 'cfg_options', None):
        check_config(arguments, command.page)


@shown_by('make')
def test_targets_of_make_exist(command):
    result = subprocess.run(
        ['make', '-n', *words_of(command)[1:]], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope='module')
def pip_help():
    command = [sys.executable, '-m', 'pip', 'install', '--help']
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@shown_by('pip')
def test_pip_is_asked_for_what_there_is(command, pip_help):
    """Checks its flags, extras and, with constraints, a pin for each package."""
    words = words_of(command)[1:]
    assert words[0] in ('install', 'wheel', 'cache')
    if words.pop(0) == 'cache':
        return
    pins = (ROOT / 'constraints.txt').read_text()
    asks_for_pins = False
    while words:
        word = words.pop(0)
        if word == '-c':
            asks_for_pins = True
            assert words.pop(0) == 'constraints.txt'
        elif word.startswith('-'):
            assert re.search(rf'(^|[\s,]){re.escape(word)}\b', pip_help), word
        elif match := re.fullmatch(r'(?:\.|mmconv2former[\w.-]*)\[(.+)\]', word):
            extras = metadata.metadata('mmconv2former').get_all('Provides-Extra')
            assert set(match[1].split(',')) <= set(extras), word
        elif word != '.' and asks_for_pins:
            name = Requirement(word).name
            assert re.search(rf'^{re.escape(name)}==', pins, flags=re.M), f'{name} is not pinned'


@shown_by('mim')
def test_mim_finds_what_it_is_asked_for(command):
    words = words_of(command)[1:]
    if words[0] in ('train', 'test'):
        recipes = [path.name for path in (ROOT / 'configs').glob('*/*.py')]
        assert words[1] == 'mmconv2former'
        assert words[2] in recipes or (ROOT / words[2]).exists()
    elif words[0] == 'run':
        assert (ROOT / f'tools/{words[2]}.py').is_file()


@shown_by('pytest')
def test_pytest_is_given_what_there_is(command):
    words = words_of(command)
    check_paths(words, command.page)
    if '-k' in words:
        text = (ROOT / words[1]).read_text()
        assert words[words.index('-k') + 1] in text


def test_every_command_is_run_or_has_its_reason():
    known = {*RUN_HERE, *RUN_BY, *NOT_RUN, *SCRIPTS}
    unknown = {
        command.program: str(command) for command in COMMANDS if command.program not in known
    }
    assert not unknown
    assert not {*RUN_BY, *NOT_RUN} - {command.program for command in COMMANDS}, 'not shown any more'


@pytest.mark.parametrize('test', [*RUN_BY.values(), *PYTHON_RUN_BY.values()])
def test_the_named_tests_exist(test):
    file, _, name = test.partition('::')
    tree = ast.parse((ROOT / 'tests' / file).read_text())
    names = {node.name for node in tree.body if hasattr(node, 'name')}
    assert not name or name in names


# ------------------------------------------------------------------------------------------ flags
@pytest.fixture(scope='module')
def all_flags():
    return set().union(*(flags_of(tool) for tool in TOOLS if has_command_line(tool)))


def has_command_line(tool):
    text = (ROOT / tool).read_text()
    return "if __name__ == '__main__':" in text and 'pars' in text


@pytest.fixture(scope='module')
def configs():
    return [Config.fromfile(ROOT / recipe) for recipe in RECIPES]


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_sentences_name_what_there_is(page, all_flags, configs):
    """Flags, files and options of configs."""
    for text, line in inline_code(page):
        for flag in re.findall(r'(?<![\w-])--[a-z][\w-]*', text):
            assert flag in all_flags | OTHER_FLAGS, f'line {line}: {flag}'
        if not re.search('[*{(]', text):
            words = [word for word in text.split() if not any(name in word for name in STAND_INS)]
            check_paths(words, page, f'line {line}')
        if text.startswith('--cfg-options ') and 'KEY=VALUE' not in text:
            for option in text.split()[1:]:
                key = option.partition('=')[0]
                assert key in WRONG or any(is_option(config, key) for config in configs), (
                    f'line {line}: {key}'
                )


# ----------------------------------------------------------------------------------------- python
PYTHON_BLOCKS = [
    (page, block) for page in PAGES for block in read_blocks(page) if block.language == 'python'
]


@pytest.mark.parametrize(
    ('page', 'block'),
    PYTHON_BLOCKS,
    ids=lambda value: f'line {value.line}' if isinstance(value, Block) else value.name,
)
def test_python_runs(page, block, guarded, project, monkeypatch):
    """Runs Python blocks as written and builds a backbone among them, without weights."""
    code = compile(block.text, f'{page.name}, line {block.line}', 'exec')
    if page.name in PYTHON_RUN_BY:
        return
    monkeypatch.chdir(project)
    names = dict(STAND_INS)
    exec(code, names)
    backbone = dict(names.get('model', {}).get('backbone', {}))
    if backbone:
        backbone.pop('_delete_', None)
        backbone.pop('init_cfg', None)
        MODELS.build(backbone)


# ------------------------------------------------------------------------------------------ links
def targets(page):
    """Links and images of a page."""
    for token in MarkdownIt().enable('table').parse(page.read_text()):
        for child in token.children or []:
            target = child.attrGet('href') or child.attrGet('src')
            if target:
                yield str(target)


def anchors(page):
    """The names that GitHub gives to a page's headings."""
    tokens = MarkdownIt().parse(page.read_text())
    found: dict[str, int] = {}
    for opening, content in itertools.pairwise(tokens):
        if opening.type == 'heading_open':
            text = ''.join(child.content for child in content.children)
            slug = re.sub(r'[^\w\- ]', '', text.lower()).replace(' ', '-')
            found[slug] = found.get(slug, -1) + 1
            yield f'{slug}-{found[slug]}' if found[slug] else slug


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in targets(page):
        if re.match('(https?|mailto):', target):
            continue
        name, _, anchor = target.partition('#')
        base = ROOT if name.startswith('/') else page.parent
        path = (base / name.lstrip('/')).resolve() if name else page
        assert path.exists(), target
        assert ROOT.resolve() in [path, *path.parents], target
        if anchor:
            assert anchor in anchors(path), target


def test_readme_links_to_every_page():
    linked = {target.partition('#')[0] for target in targets(ROOT / 'README.md')}
    assert not {f'docs/{page.name}' for page in DOCS} - linked


def test_readme_is_short():
    assert len((ROOT / 'README.md').read_text().splitlines()) <= 125


def test_rows_quoted_in_answers_are_those_of_other_pages():
    """Numbers are written by their commands into one page and quoted from there."""
    others = '\n'.join(page.read_text() for page in DOCS if page.name != 'faq.md').splitlines()
    rows = re.findall(r'^\|.*\d\.\d\d \|.*$', (ROOT / 'docs/faq.md').read_text(), flags=re.M)
    assert len(rows) >= 2
    assert not set(rows) - set(others)
