"""What the distribution asks pip for and holds, and that OpenMMLab's `mim` finds its way in it."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from helpers import ROOT
from make_tables import models
from modelindex.load_model_index import load

import mmconv2former
from mmconv2former import __main__

MIM = 'mmconv2former/.mim'
IN_MIM = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ('configs', 'tools')
    for path in (ROOT / folder).rglob('*')
    if path.is_file() and '__pycache__' not in path.parts
) + ['model-index.yml']


def requirements(extra=None):
    """Names required for an extra, or (None) in any case."""
    names = set()
    for line in metadata.requires('mmconv2former'):
        requirement, _, marker = line.partition(';')
        wanted = f'extra == "{extra}"' in marker.replace("'", '"') if extra else not marker
        if wanted:
            names.add(requirement.split('>')[0].split('<')[0].split('=')[0].strip())
    return names


def test_version_has_one_source():
    assert metadata.version('mmconv2former') == mmconv2former.__version__


def test_no_family_of_openmmlab_is_pulled_in_unasked():
    assert requirements() == {'torch', 'filelock', 'numpy', 'rich'}


def test_each_family_has_its_extra():
    onedl, openmmlab = requirements('onedl'), requirements('openmmlab')
    assert onedl >= {'onedl-mmengine', 'onedl-mmcv', 'onedl-mmdetection', 'onedl-mmsegmentation'}
    assert openmmlab >= {'mmengine', 'mmcv', 'mmdet', 'mmsegmentation', 'mmpretrain'}
    assert not onedl & openmmlab
    assert {'pytest', 'ruff'} <= requirements('test')


# ----------------------------------------------------------------------------------- distributions
def run(*command, **options):
    result = subprocess.run(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


def build(source, *command):
    """Calls a hook of the build backend in a source tree; returns what it printed."""
    return run(sys.executable, '-c', f'from setuptools import build_meta; {"".join(command)}',
               cwd=source)  # fmt: skip


def copy_clone(folder):
    """Copies what a fresh clone holds, so that nothing is built in this one."""
    unwanted = ('.git', '.venv*', '.mim', 'build', 'dist', '*.egg-info', '__pycache__', '.*_cache',
                'data', 'pretrain', 'work_dirs')  # fmt: skip
    return shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*unwanted))


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    return copy_clone(tmp_path_factory.mktemp('clone') / 'project')


@pytest.fixture(scope='module')
def wheel(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp('wheel')
    options = ['--no-deps', '--no-build-isolation', '--no-index', '--wheel-dir', folder]
    printed = run(sys.executable, '-m', 'pip', 'wheel', '-v', *options, source)
    assert 'eprecat' not in printed
    (path,) = folder.iterdir()
    return path


@pytest.fixture(scope='module')
def unpacked(wheel, tmp_path_factory):
    """A folder that holds the wheel's files."""
    folder = tmp_path_factory.mktemp('unpacked')
    shutil.unpack_archive(wheel, folder, 'zip')
    return folder


def contents(wheel):
    """Files of a wheel and what is in them, without pip's own record of them."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith('RECORD')]
        return {name: archive.read(name) for name in names}


def test_wheel_holds_package_configs_and_tools(wheel):
    found = contents(wheel)
    in_mim = {name.removeprefix(f'{MIM}/') for name in found if name.startswith(f'{MIM}/')}
    assert in_mim == set(IN_MIM)
    for name in IN_MIM:
        assert found[f'{MIM}/{name}'] == (ROOT / name).read_bytes(), name
    rest = {name for name in found if not name.startswith(f'{MIM}/') and '.dist-info/' not in name}
    modules = (ROOT / 'mmconv2former').rglob('*.py')
    assert rest == {str(path.relative_to(ROOT)) for path in modules if '.mim' not in path.parts}
    assert wheel.name == f'mmconv2former-{mmconv2former.__version__}-py3-none-any.whl'


def test_source_distribution_makes_the_same_wheel(source, wheel, tmp_path):
    printed = build(source, f'build_meta.build_sdist({str(tmp_path)!r})')
    assert 'eprecat' not in printed
    assert 'warning: no ' not in printed
    (archive,) = tmp_path.glob('*.tar.gz')
    shutil.unpack_archive(archive, tmp_path / 'unpacked')
    (unpacked,) = (tmp_path / 'unpacked').iterdir()
    assert not (unpacked / 'tests').exists()
    build(unpacked, f'build_meta.build_wheel({str(tmp_path)!r})')
    (again,) = tmp_path.glob('*.whl')
    assert contents(again) == contents(wheel)


def test_editable_installation_links(tmp_path):
    """Twice, as after another `pip install --editable`."""
    source = copy_clone(tmp_path / 'project')
    for number in range(2):
        build(source, f'build_meta.build_editable({str(tmp_path / str(number))!r})')
    for name in ('configs', 'tools', 'model-index.yml'):
        assert (source / MIM / name).is_symlink()
        assert (source / MIM / name).resolve() == source / name
    # Beside which openmim looks for the package.
    assert 'Version' in (source / 'mmconv2former.egg-info/PKG-INFO').read_text()
    ignored = ['git', 'check-ignore', f'{MIM}/configs', f'{MIM}/tools']
    if (ROOT / '.git').exists():
        assert len(run(*ignored, cwd=ROOT).splitlines()) == 2


@pytest.mark.parametrize('place', ['clone', 'wheel'])
def test_module_lists_and_runs_the_tools(place, unpacked, tmp_path):
    folder = unpacked if place == 'wheel' else ROOT
    settings = {**os.environ, 'PYTHONPATH': str(folder)}
    module = [sys.executable, '-W', 'ignore', '-m', 'mmconv2former']
    printed = run(*module, cwd=tmp_path, env=settings)
    assert '\n  train         Trains any recipe' in printed
    assert f'tools and recipes: {folder / MIM if place == "wheel" else ROOT}\n' in printed
    assert 'usage: plot_curves.py' in run(*module, 'plot_curves', '-h', cwd=tmp_path, env=settings)


def test_module_names_unknown_tools(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['mmconv2former', 'trian'])
    with pytest.raises(SystemExit, match="no tool is called 'trian'"):
        __main__.main()
    assert '  train ' in capsys.readouterr().out


def test_tools_work_where_the_wheel_puts_them(unpacked, tmp_path):
    """They import each other; `mim` would add --gpus if the help had that word."""
    settings = {**os.environ, 'PYTHONPATH': str(unpacked)}
    tool = unpacked / MIM / 'tools/train.py'
    text = run(sys.executable, tool, '-h', cwd=tmp_path, env=settings)
    assert '--work-dir' in text
    assert '--gpus' not in text
    assert '--device' not in text
    names = sorted(path.stem for path in tool.parent.glob('*.py'))
    assert 'benchmark' in names
    code = f'import {", ".join(names)}'
    run(sys.executable, '-W', 'ignore', '-c', code, cwd=tool.parent, env=settings)


# ---------------------------------------------------------------------------------------- metafiles
def test_model_index_is_as_openmmlab_reads_it():
    index = load(str(ROOT / 'model-index.yml'))
    index.build_models_with_collections()
    assert index.check(silent=True) == []
    written = {
        path.relative_to(ROOT).as_posix() for path in (ROOT / 'configs').rglob('metafile.yml')
    }
    assert set(yaml.safe_load((ROOT / 'model-index.yml').read_text())['Import']) == written
    collections = {collection.name for collection in index.collections}
    for model in index.models:
        assert model.in_collection in collections, model.name
        assert (ROOT / model.config).is_file(), model.name
        assert Path(model.config).stem == model.name
    for model in models():
        assert {'Training Data', 'Batch Size', 'Pretraining'} <= set(model['Metadata'])
        assert {'Epochs', 'Iterations'} & set(model['Metadata'])


# --------------------------------------------------------------------------------------------- mim
QUICK = ['model.backbone.arch=nano', 'model.neck.in_channels=[64,128,256,512]',
         'train_dataloader.batch_size=2', 'train_cfg.max_epochs=1',
         'default_hooks.logger.interval=1', 'model.test_cfg.rcnn.score_thr=0.0']  # fmt: skip
MIM_PACKAGES = ['openmim', 'colorama', 'tabulate', 'pandas', 'model-index', 'requests', 'urllib3',
                'certifi', 'charset-normalizer', 'idna', 'python-dateutil']  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['wheel', 'editable'])
def test_mim_runs_trains_and_tests(kind, wheel, tmp_path):
    """With this package and openmim in an environment that has all else from this one."""
    environment = tmp_path / 'environment'
    venv.create(environment)
    (packages,) = environment.glob('lib/python*/site-packages')
    (packages / 'base.pth').write_text(sysconfig.get_paths()['purelib'])
    pip = [sys.executable, '-m', 'pip', '--python', environment / 'bin/python', 'install',
           '--quiet', '--no-deps', '--ignore-installed']  # fmt: skip
    run(*pip, '--constraint', ROOT / 'constraints.txt', *MIM_PACKAGES)
    settings = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}
    if kind == 'wheel':
        run(*pip, wheel)
        folder, program = tmp_path, [environment / 'bin/mim']
        configs = f'{packages}/{MIM}/configs'
    else:
        folder, program = copy_clone(tmp_path / 'clone'), [environment / 'bin/python', '-m', 'mim']
        run(*pip, '--no-build-isolation', '--editable', folder, env=settings)
        configs = f'{folder}/configs'

    def mim(*arguments):
        return run(*program, *arguments, cwd=folder, env=settings)

    mim('run', 'mmconv2former', 'make_sample', 'data', '--train', 8, '--val', 4, '--size', 64)
    options = ['--work-dir', 'work', '--data-root', 'data/coco', '--cfg-options', *QUICK]
    config = 'mask_rcnn_demo.py'
    printed = mim('train', 'mmconv2former', config, *options)
    assert f'{configs}/demo/{config}' in printed
    assert 'Training finished successfully' in printed
    checkpoint = folder / 'work/epoch_1.pth'
    printed = mim('test', 'mmconv2former', config, '--checkpoint', checkpoint, *options)
    assert 'coco/bbox_mAP' in printed
    assert 'Testing finished successfully' in printed
    printed = mim('run', 'mmconv2former', 'demo', '--train', 8, '--val', 3, '--epochs', 1)
    assert 'minutes in all' in printed
