#!/bin/sh
# Fill a folder with all that `lodbrain segment` needs on CPUs, for the images of this folder; python3 is 3.11.
#   infra/containers/install_segment.sh FOLDER
# TORCH_WHEELS: page or folder with torch's CPU build.
set -eu
folder=$1
root=$(cd "$(dirname "$0")/../.." && pwd)
list=$root/infra/containers/segment-requirements.txt
torch=$(sed -n 's/^\(torch==.*\)/\1/p' "$list")
export PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

python3 -m venv "$folder"
pip() { "$folder/bin/python" -m pip "$@"; }
pip install --quiet 'pip==26.3'
pip install --quiet --no-deps --find-links "${TORCH_WHEELS:-https://download.pytorch.org/whl/cpu/torch/}" "$torch+cpu"
pip install --quiet --no-deps --requirement "$list"
pip install --quiet --no-deps --no-build-isolation "$root"
rm -rf "$folder"/lib/python*/site-packages/torch/include "$folder"/lib/python*/site-packages/torch/test  # for who compiles against torch
find "$folder"/lib/python*/site-packages/torch/bin -type f ! -name torch_shm_manager -delete
pip check | grep -v '^lodbrain ' >&2 && exit 1  # the project names more than this command needs; whatever else is missing is an error
pip uninstall --quiet --yes pip
"$folder/bin/lodbrain" weights list >/dev/null
