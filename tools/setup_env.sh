#!/usr/bin/env bash
# Creates the environment that `make` uses, in .venv: every package with the version and hash of
# constraints.txt, mmcv with its compiled ops, and this project (editable).
#
#   tools/setup_env.sh              # Python from $PYTHON, else the first of 3.11, 3.12, 3.10
#
# Safe to run again, also after an interruption. To do the same by hand: README, Installation.
set -euo pipefail
cd -- "$(dirname -- "$0")/.."

VENV=.venv
WHEELS=$VENV/wheels           # mmcv's wheel
INSTALLING=$VENV/.installing  # exists while pip runs; if it is left over, start from scratch
STAMP=$VENV/.complete         # fingerprint of what was installed
# needed besides torch to build mmcv and other source distributions without isolation
BUILD_PACKAGES=(setuptools wheel ninja packaging numpy click)

say() { printf '[setup %4ds] %s\n' "$SECONDS" "$*"; }
die() { printf '[setup] error: %s\n' "$*" >&2; exit 1; }

# Changes with everything that decides what is installed.
fingerprint() { cat constraints.txt setup.py tools/setup_env.sh | cksum; }

find_python() {
  local candidate candidates=(python3.11 python3.12 python3.10 python3)
  [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
  for candidate in "${candidates[@]}"; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' \
        2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  die "Python 3.10, 3.11 or 3.12 is needed; tried ${candidates[*]}. Install one, or name it: PYTHON=/path/to/python make setup"
}

check_machine() {
  local python=$1 needed_mib free_mib
  "$python" -c 'import ensurepip, venv' 2>/dev/null ||
    die "$python has no venv module. Debian and Ubuntu: apt-get install python3-venv"
  [ -e "$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')/Python.h" ] ||
    die "$python has no headers (Python.h), which mmcv's ops need. Debian and Ubuntu: apt-get install python3-dev"
  echo '#include <optional>
int main() { return std::optional<int>(0).value(); }' |
    "${CXX:-c++}" -std=c++17 -x c++ -fsyntax-only - 2>/dev/null ||
    die "no C++17 compiler works as '${CXX:-c++}'; mmcv's ops are compiled here. Debian and Ubuntu: apt-get install g++"
  needed_mib=6500  # 5,700 MiB were used on Linux x86_64; mmcv's build needs more for a while
  [ ! -d $VENV/lib ] || needed_mib=1500
  free_mib=$(($(df -Pk . | awk 'NR == 2 {print $4}') / 1024))
  [ "$free_mib" -ge $needed_mib ] ||
    die "$needed_mib MiB of disk are needed in $PWD, but $free_mib MiB are free"
}

pip() { "$VENV/bin/python" -m pip --disable-pip-version-check "$@"; }

# Without constraints, for local files, which have no hashes there.
pip_install() {
  touch $INSTALLING
  pip install --quiet "$@"
  rm $INSTALLING
}

pip_install_pinned() { pip_install --constraint constraints.txt "$@"; }

# Python's own pip may be too old to check hashes of constraints; it can check those of requirements.
install_pip() {
  sed -n '/^pip==/,/[^\\]$/p' constraints.txt >$VENV/pip.txt
  pip_install --require-hashes --requirement $VENV/pip.txt
}

build_mmcv() {  # further arguments for pip
  rm -rf $WHEELS $WHEELS.new
  # -g0 -O2 takes half the time and a twentieth of the space. With build isolation, mmcv would not
  # find torch and would be built without its ops.
  CFLAGS="${CFLAGS:--g0 -O2}" MAX_JOBS="${MAX_JOBS:-$(nproc)}" pip wheel --quiet --no-deps \
    --no-build-isolation --constraint constraints.txt --wheel-dir $WHEELS.new "$@" onedl-mmcv
  mv $WHEELS.new $WHEELS
}

check_ops() {
  $VENV/bin/python - <<'PYTHON'
import torch
from mmcv.ops import nms, roi_align

boxes = torch.tensor([[0.0, 0, 10, 10], [1, 1, 10, 10], [20, 20, 30, 30]])
assert nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.5)[1].tolist() == [0, 2]
features = torch.arange(64.0).view(1, 1, 8, 8)
rois = torch.tensor([[0.0, 0, 0, 8, 8]])
assert roi_align(features, rois, (2, 2)).flatten().tolist() == [13.5, 17.5, 45.5, 49.5]
PYTHON
}

if [ -e $STAMP ] && [ "$(cat $STAMP)" = "$(fingerprint)" ]; then
  say "$VENV is complete"
  exit
fi
python=$(find_python)
check_machine "$python"

if [ -e $INSTALLING ] || ! $VENV/bin/python -m pip --version >/dev/null 2>&1; then
  say "creating $VENV with $("$python" --version)"
  rm -rf $VENV
  "$python" -m venv $VENV
fi
if [ -e $STAMP ]; then  # created from other pins
  rm -rf $WHEELS $STAMP
fi
say 'installing torch (about 1 minute, 2.5 GB of downloads the first time)'
install_pip
pip_install_pinned "${BUILD_PACKAGES[@]}"
pip_install_pinned torch torchvision

if ! ls $WHEELS/*.whl >/dev/null 2>&1; then
  say 'building mmcv with its ops (about 8 minutes on 2 cores, seconds if pip has the wheel)'
  build_mmcv
fi
say 'installing the OpenMMLab packages and this project (about 1 minute)'
pip_install --no-deps $WHEELS/*.whl
# without setuptools' warnings about editable installs
PYTHONWARNINGS=ignore pip_install --no-deps --no-build-isolation --editable .
pip_install_pinned --no-build-isolation 'mmconv2former[onedl,test]'
# mmsegmentation requires the OpenCV that needs libGL; the headless build has the same files and
# replaces them.
pip_install_pinned --force-reinstall --no-deps opencv-python-headless

say "checking mmcv's ops (NMS, RoIAlign)"
if ! check_ops; then
  # A wheel in pip's cache may have been built for another torch, or without ops.
  say 'they do not work; building them again without the cache'
  build_mmcv --no-cache-dir
  pip_install --force-reinstall --no-deps $WHEELS/*.whl
  check_ops || die "mmcv.ops does not work with this torch (error above). Start from scratch with: rm -rf $VENV && make setup"
fi
fingerprint >$STAMP
say "done: $VENV is complete"
