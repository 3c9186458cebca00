"""Fixtures and options that several test files share.

pytest --slow                                      # every test at its full count
pytest tests/reliability --slow --reliability-page docs/reliability.md
"""

import gc
import os
import re
from pathlib import Path

if not any(Path(device).exists() for device in ('/dev/nvidiactl', '/dev/kfd')):
    os.environ['TRITON_INTERPRET'] = '1'  # Triton, which torch imports, reads it at import

import pytest
import torch
from common.tables import with_table
from helpers.simulated_graphs import simulated  # noqa: F401 (a fixture)
from helpers.tools import forget_visualizers, run_tool
from helpers.training_server import TrainingServer
from mmengine.runner import CheckpointLoader

from mmconv2former.checkpoint.reading import TRUST_VARIABLE, admit_only_data

# Of the table of faults, in this order.
AREAS = ['Killed', 'Disk', 'Data', 'Numbers', 'Checkpoints', 'Configs', 'Processes', 'Long runs',
         'Supply chain']  # fmt: skip


def pytest_addoption(parser):
    parser.addoption(
        '--slow', action='store_true', help='also what takes minutes, and every fault at full count'
    )
    parser.addoption(
        '--reliability-page', type=Path, help='page whose table of faults is written anew'
    )


def pytest_configure(config):
    config.addinivalue_line('markers', 'slow: takes minutes; runs with --slow only')
    config.addinivalue_line('markers', 'gpu: needs a CUDA device')
    page = config.option.reliability_page
    if page is None or hasattr(config, 'workerinput'):  # a worker of pytest-xdist only reports
        return
    if not page.is_file():
        raise pytest.UsageError(f'--reliability-page {page} does not exist')
    config.pluginmanager.register(ReliabilityPage(page))


class ReliabilityPage:
    """Writes what tests entered with `fault_report` into a page."""

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
        # Tests of several workers end in any order.
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
    """Deselects slow tests, rather than skips: what CI does not run is documented, not excused."""
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
def own_downloads(tmp_path_factory):
    """A folder of these tests for what is kept of downloads."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv('TORCH_HOME', str(tmp_path_factory.mktemp('torch')))
        yield


@pytest.fixture(scope='session', autouse=True)
def quick_runs():
    """Without two habits of mmengine that cost more time than a short run itself."""
    gc.freeze()  # each dataset collects garbage: now without what the libraries have built
    with pytest.MonkeyPatch.context() as monkeypatch:
        # It formats the config for each log and each checkpoint.
        monkeypatch.setattr('yapf.yapflib.yapf_api.FormatCode', lambda text, **_: (text, True))
        yield


@pytest.fixture(autouse=True)
def own_visualizers():
    """Without those of earlier tests, into whose work dirs a run would log."""
    forget_visualizers()


@pytest.fixture
def slow(request):
    """Whether tests run at their full count."""
    return request.config.option.slow


@pytest.fixture
def fault_report(request):
    """Enters a fault that a test injected in the table of docs/reliability.md.

    `fault_report(area, fault, tries, survived, seen)`, once or more in a test, before it asserts
    that `survived == tries`. `area` is one of `AREAS`, `fault` what was done, `seen` what the user
    sees, in the program's own words.
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
    options = ['--train', '40', '--val', '6', '--size', '64']
    run_tool('make_sample.py', folder, *options)
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
def server():
    """Runs train.py and test.py without the time of their imports."""
    server = TrainingServer()
    yield server
    server.close()


@pytest.fixture
def guarded(monkeypatch):
    """mmengine with our loaders, as the tools set it up, for one test."""
    monkeypatch.setattr(CheckpointLoader, '_schemes', dict(CheckpointLoader._schemes))
    for variable in (TRUST_VARIABLE, 'TORCH_FORCE_WEIGHTS_ONLY_LOAD'):
        monkeypatch.setenv(variable, '0')  # so that it is restored
    monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '1')
    admit_only_data()


@pytest.fixture
def in_process(guarded, monkeypatch):
    """What tools change in their process is restored: for tests that call their `main`."""
    monkeypatch.setenv('LOCAL_RANK', '0')


@pytest.fixture
def no_data(monkeypatch):
    """Fails a test whose tool comes as far as loading data."""

    def build_dataloader(*args, **kwargs):
        pytest.fail('data were loaded before the refusal')

    monkeypatch.setattr('mmconv2former.ReliableRunner.build_dataloader', build_dataloader)
