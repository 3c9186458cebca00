#!/usr/bin/env bash
# Creates the environment that `make` uses, in .venv: every package at the version and hash of
# constraints.txt, and this project (editable). Needs no compiler.
#
#   tools/setup_env.sh                      # Python from $PYTHON, else the first of 3.11, 3.12, 3.10, 3.13
#   MMCV_OPS=compiled tools/setup_env.sh    # compiles mmcv's operators
#   MMCV_OPS=torchvision tools/setup_env.sh # and removes them again
#   tools/setup_env.sh uv                   # only uv, in .venv-uv
#
# Safe to run again, also after an interruption. To do the same by hand: docs/installation.md.
set -euo pipefail
cd -- "$(dirname -- "$0")/.."

export UV_SYSTEM_CERTS=${UV_SYSTEM_CERTS:-true}  # as pip, for networks with certificates of their own
VENV=.venv
UV=.venv-uv/bin/uv
INSTALLING=$VENV/.installing  # exists while uv installs; if it is left over, start from scratch
STAMP=$VENV/.complete         # fingerprint of what was installed
OPS=$VENV/.mmcv_ops           # torchvision or compiled, kept by later runs
SOURCE=$VENV/mmcv             # mmcv's source, to compile it

say() { printf '[setup %4ds] %s\n' "$SECONDS" "$*"; }
die() { printf '[setup] error: %s\n' "$*" >&2; exit 1; }

# Changes with everything that decides what is installed.
fingerprint() { { cat constraints.txt setup.py tools/setup_env.sh; echo "$MMCV_OPS"; } | cksum; }

find_python() {
  local candidate candidates=(python3.11 python3.12 python3.10 python3.13 python3)
  [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
  for candidate in "${candidates[@]}"; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' \
        2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  die "Python 3.10, 3.11, 3.12 or 3.13 is needed; tried ${candidates[*]}. Install one, or name it: PYTHON=/path/to/python make setup"
}

check_machine() {
  local python=$1 needed_mib free_mib
  "$python" -c 'import ensurepip, venv' 2>/dev/null ||
    die "$python has no venv module. Debian and Ubuntu: apt-get install python3-venv"
  needed_mib=6500  # 5,700 MiB were used on Linux x86_64
  [ ! -d $VENV/lib ] || needed_mib=1500
  free_mib=$(($(df -Pk . | awk 'NR == 2 {print $4}') / 1024))
  [ "$free_mib" -ge $needed_mib ] ||
    die "$needed_mib MiB of disk are needed in $PWD, but $free_mib MiB are free"
}

check_compiler() {
  local python=$1
  [ -e "$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')/Python.h" ] ||
    die "$python has no headers (Python.h), which MMCV_OPS=compiled needs. Debian and Ubuntu: apt-get install python3-dev"
  echo '#include <concepts>
int main() { return 0; }' | "${CXX:-c++}" -std=c++20 -x c++ -fsyntax-only - 2>/dev/null ||
    die "no C++20 compiler works as '${CXX:-c++}', which MMCV_OPS=compiled needs. Debian and Ubuntu: apt-get install g++"
}

# By itself, because `make pins` must work where the rest fails: a new requirement has no pin yet.
install_uv() {
  [ ! -x $UV ] || return 0
  "$(find_python)" -m venv ${UV%/bin/uv}
  sed -n '/^uv==/,/[^\\]$/p' constraints.txt >${UV%/bin/uv}/uv.txt
  ${UV%/bin/uv}/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes \
    --requirement ${UV%/bin/uv}/uv.txt
}

uv_pip() {  # subcommand and its arguments
  local subcommand=$1
  shift
  touch $INSTALLING
  UV_HTTP_TIMEOUT=${UV_HTTP_TIMEOUT:-180} $UV pip "$subcommand" --quiet \
    --python $VENV/bin/python --build-constraints constraints.txt "$@"
  rm $INSTALLING
}

compile_mmcv() {
  rm -rf $SOURCE
  $VENV/bin/python -m pip download --quiet --disable-pip-version-check --no-deps \
    --no-binary onedl-mmcv --constraint constraints.txt --build-constraint constraints.txt \
    --dest $SOURCE onedl-mmcv
  tar -xzf $SOURCE/*.tar.gz -C $SOURCE --strip-components 1
  # mmcv asks for C++17, torch's headers need C++20.
  sed -i 's/-std=c++17/-std=c++20/' $SOURCE/setup.py
  # -g0 -O2 takes half the time and a twentieth of the space. An isolated build would not find torch.
  CFLAGS="${CFLAGS:--g0 -O2}" MAX_JOBS="${MAX_JOBS:-$(nproc)}" uv_pip install --reinstall \
    --no-deps --no-build-isolation ./$SOURCE
  rm -rf $SOURCE
}

if [ "${1:-}" = uv ]; then
  install_uv
  exit
fi
MMCV_OPS=${MMCV_OPS:-$(cat $OPS 2>/dev/null || echo torchvision)}
case $MMCV_OPS in
  torchvision | compiled) ;;
  *) die "MMCV_OPS must be torchvision or compiled, got $MMCV_OPS" ;;
esac
if [ -e $STAMP ] && [ "$(cat $STAMP)" = "$(fingerprint)" ]; then
  say "$VENV is complete"
  exit
fi
python=$(find_python)
check_machine "$python"
[ "$MMCV_OPS" = torchvision ] || check_compiler "$python"

if [ -e $INSTALLING ] || ! $VENV/bin/python -m pip --version >/dev/null 2>&1; then
  say "creating $VENV with $("$python" --version)"
  rm -rf $VENV
  "$python" -m venv $VENV
fi
rm -f $STAMP
echo "$MMCV_OPS" >$OPS
say 'installing torch, the OpenMMLab packages and this project (2.5 GB of downloads the first time)'
install_uv
# mmcv is pure Python: built in isolation, it finds no torch and has no operators. After
# MMCV_OPS=compiled it is replaced.
uv_pip sync --require-hashes --reinstall-package onedl-mmcv constraints.txt
# mmsegmentation requires the OpenCV that needs libGL; the headless build has the same files and
# replaces them.
sed -n '/^opencv-python-headless==/,/[^\\]$/p' constraints.txt >$VENV/opencv.txt
uv_pip install --require-hashes --reinstall --no-deps --requirement $VENV/opencv.txt
# The project itself has no hash.
uv_pip install --no-deps --editable .
if [ "$MMCV_OPS" = compiled ]; then
  say "compiling mmcv's operators (minutes)"
  compile_mmcv
fi
say 'checking: Mask R-CNN trains one step'
$VENV/bin/python tools/check_setup.py
fingerprint >$STAMP
say "before other commands: . $VENV/bin/activate"
say "done: $VENV is complete"
