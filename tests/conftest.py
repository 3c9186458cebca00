"""Fixtures and options of all tests.

pytest --slow                                      # every test at its full count
pytest tests/reliability --slow --reliability-page docs/tables/reliability.md
"""

import gc
import os
import re
import tempfile
from pathlib import Path

if not any(Path(device).exists() for device in ('/dev/nvidiactl', '/dev/kfd')):
    os.environ['TRITON_INTERPRET'] = '1'  # read when torch imports Triton

import pytest
import torch

# Writes its cache at the first import, which several processes cannot do at a time: here pytest
# has not started any.
import yapf.yapflib.yapf_api  # noqa: F401
from common.tables import with_table
from helpers.in_process import isolated
from helpers.runs import run
from helpers.simulated_graphs import simulated  # noqa: F401 (a fixture)
from helpers.tiny import tiny_config
from helpers.tools import run_tool
from helpers.training_server import TrainingServer

from mmconv2former import ReliableRunner
from mmconv2former.checkpoint.reading import TRUST_VARIABLE, admit_only_data

# Sections of the table of faults, in this order.
AREAS = ['Killed', 'Disk', 'Data', 'Numbers', 'Checkpoints', 'Configs', 'Processes', 'Long runs',
         'Supply chain']  # fmt: skip


def pytest_addoption(parser):
    parser.addoption(
        '--slow', action='store_true', help='run slow tests, and inject every fault at full count'
    )
    parser.addoption('--reliability-page', type=Path, help='page whose table of faults to rewrite')


def pytest_configure(config):
    config.addinivalue_line('markers', 'slow: takes minutes; runs with --slow only')
    config.addinivalue_line('markers', 'gpu: needs a CUDA device')
    page = config.option.reliability_page
    if page is None or hasattr(config, 'workerinput'):  # a worker of pytest-xdist writes nothing
        return
    if not page.is_file():
        raise pytest.UsageError(f'--reliability-page {page} does not exist')
    if '<!-- table reliability -->' not in page.read_text():
        raise pytest.UsageError(f'--reliability-page {page} has no <!-- table reliability -->')
    config.pluginmanager.register(ReliabilityPage(page))


class ReliabilityPage:
    """Writes what tests reported with `fault_report` into a page."""

    def __init__(self, page):
        self.page = page
        self.faults = []

    def pytest_runtest_logreport(self, report):
        if report.when == 'call':
            found = [tuple(value) for name, value in report.user_properties if name == 'fault']
            self.faults += [(AREAS.index(area), report.nodeid, *rest) for area, *rest in found]

    def pytest_sessionfinish(self):
        lines = ['| | fault | tries | survived | what the user sees |', '|---|---|---|---|---|']
        area_before = None
        # With several workers tests end in any order.
        for area, _, fault, tries, survived, seen in sorted(self.faults, key=lambda row: row[:2]):
            shown = seen.replace('|', '\\|').replace('\n', ' ')
            title = f'**{AREAS[area]}**' if area != area_before else ''
            lines.append(f'| {title} | {fault} | {tries:,} | {survived:,} | {shown} |')
            area_before = area
        tries, survived = (sum(row[i] for row in self.faults) for i in (3, 4))
        lines.append(f'| **all** | {len(self.faults)} faults | {tries:,} | {survived:,} | |')
        table = '\n'.join(lines) + '\n'
        self.page.write_text(with_table(self.page.read_text(), 'reliability', table))


def pytest_collection_modifyitems(config, items):
    """Deselects slow tests without `--slow`, skips those that need a GPU without one."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker('gpu'):
                item.add_marker(pytest.mark.skip(reason='torch finds no CUDA device'))
    if config.option.slow:
        return
    slow = [item for item in items if item.get_closest_marker('slow')]
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if item not in slow]


@pytest.fixture(scope='session', autouse=True)
def quick_process():
    """A folder of its own for downloads, and no two habits of mmengine that cost more time than a
    short run itself.
    """
    gc.freeze()  # each dataset collects garbage: now without what the libraries have built
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv('TORCH_HOME', folder)
        # mmengine formats the config for each log and file: half a second each.
        monkeypatch.setattr('yapf.yapflib.yapf_api.FormatCode', lambda text, **_: (text, True))
        yield


@pytest.fixture(autouse=True)
def leaves_no_trace():
    """Environment, loggers, visualizers, threads, ... are the same after each test."""
    with isolated():
        yield


@pytest.fixture
def slow(request):
    """Whether tests run at their full count."""
    return request.config.option.slow


@pytest.fixture
def fault_report(request):
    """Reports an injected fault for docs/tables/reliability.md.

    Call `fault_report(area, fault, tries, survived, seen)` before asserting `survived == tries`.
    `area` is one of `AREAS`, `seen` what the user sees, in the program's own words.
    """

    def report(area, fault, tries, survived, seen):
        assert area in AREAS
        seen = re.sub(r'/\S*/pytest-of-\w+/pytest-\d+(/popen-gw\d+)?', '...', seen)
        request.node.user_properties.append(('fault', [area, fault, tries, survived, seen]))

    return report


@pytest.fixture(scope='session')
def sample(tmp_path_factory):
    """A small embedded sample: folder with `coco` and `ade/ADEChallengeData2016`."""
    folder = tmp_path_factory.mktemp('data') / 'sample'
    run_tool('make_sample.py', folder, '--train', '40', '--val', '6', '--size', '64')
    return folder


@pytest.fixture(scope='session')
def real_samples():
    """The folder with real samples of COCO and ADE20K that MMCONV2FORMER_SAMPLES names."""
    folder = os.environ.get('MMCONV2FORMER_SAMPLES')
    if folder is None:
        pytest.skip('MMCONV2FORMER_SAMPLES names no folder with real samples')
    assert Path(folder, 'coco_sample').is_dir(), (
        f'MMCONV2FORMER_SAMPLES={folder} has no coco_sample'
    )
    return Path(folder).resolve()


@pytest.fixture(scope='session')
def finished(sample, tmp_path_factory):
    """The work dir of a run that has written iter_2.pth and iter_4.pth; not to be changed."""
    work_dir = tmp_path_factory.mktemp('finished')
    run(tiny_config('segmentation', sample, work_dir, 4, 2))
    return work_dir


@pytest.fixture(scope='session')
def server():
    """Runs train.py and test.py in processes of their own."""
    server = TrainingServer()
    yield server
    server.stop()


@pytest.fixture
def at_moment(monkeypatch):
    """Calls functions with the runner: after the third call of such hooks, for example, by
    `at_moment(after_train_iter=(3, function))`.
    """
    call_hook = ReliableRunner.call_hook

    def register(**events):
        counts = dict.fromkeys(events, 0)

        def call(self, fn_name, **kwargs):
            call_hook(self, fn_name, **kwargs)
            if fn_name in events:
                counts[fn_name] += 1
                number, function = events[fn_name]
                if counts[fn_name] == number:
                    function(self)

        monkeypatch.setattr(ReliableRunner, 'call_hook', call)

    return register


@pytest.fixture
def guarded(monkeypatch):
    """mmengine reads checkpoints with our loaders, as the tools set it up."""
    for variable in (TRUST_VARIABLE, 'TORCH_FORCE_WEIGHTS_ONLY_LOAD'):
        monkeypatch.setenv(variable, '0')
    monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '1')
    admit_only_data()


@pytest.fixture
def in_process(guarded):
    """For tests that run tools in this process."""


@pytest.fixture
def no_data(monkeypatch):
    """Fails a test whose tool loads data."""

    def build_dataloader(*args, **kwargs):
        pytest.fail('data were loaded before the refusal')

    monkeypatch.setattr('mmconv2former.ReliableRunner.build_dataloader', build_dataloader)
