#!/bin/sh
# Fill a virtual environment with the exact versions of requirements.lock.
#   infra/install.sh VENV [cpu|cuda]
# cpu (default): torch's CPU build, 0.2 GB, from pip's own sources where they offer it, else from PyTorch's CPU index.
# cuda: torch as pip's sources offer it; on Linux the public index has the CUDA build, several GB.
set -eu
venv=$1 build=${2:-cpu}
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
torch=$(sed -n 's/^\(torch==.*\)/\1/p' "$root/requirements.lock")

case $build in cpu|cuda) ;; *) echo "error: TORCH=$build; cpu or cuda is wanted" >&2; exit 2 ;; esac
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || {
    echo "error: $python is $("$python" --version 2>&1); Python 3.11 or newer is wanted (make PYTHON=/path/to/python3.11 …)" >&2; exit 2; }
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv" || {
    echo "error: $python cannot make a virtual environment; its venv module is wanted (Debian: python3-venv)" >&2; exit 2; }
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

echo "installing into $venv, torch build: $build (a few minutes the first time)"
pip install --quiet --quiet 'pip==26.3'
have=$(pip list --format=freeze 2>/dev/null | sed -n 's/^torch==//p')
case $build in
cpu)
    case "$(uname -s)/$have" in
    */*+cpu) ;;
    Darwin/*) pip install --quiet --quiet --no-deps "$torch" ;;
    *) pip install --quiet --quiet --no-deps "$torch+cpu" 2>/dev/null ||
       pip install --quiet --quiet --no-deps --index-url https://download.pytorch.org/whl/cpu "$torch" ;;
    esac ;;
cuda)
    case $have in *+cpu) pip uninstall --quiet --quiet --yes torch ;; esac
    pip install --quiet --quiet --constraint "$root/requirements.lock" "$torch" ;;
esac
pip install --quiet --quiet --requirement "$root/requirements.lock"
pip install --quiet --quiet --no-deps --no-build-isolation --editable "$root"
