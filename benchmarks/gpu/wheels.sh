#!/usr/bin/env bash
# The packages of ours that images with torch and Triton alone lack, or have in too old a release (timm), as wheels for a machine without a network:
#   benchmarks/gpu/wheels.sh [FOLDER] [PYTHON]      (default: wheels 3.12; PYTHON is the version there, x86-64 Linux)
# Versions are those of requirements.lock. DeepSpeed comes as source alone and is built here, without its operators: what
# we use of it is Python. That needs torch in the environment of PIP_PYTHON (default: .venv/bin/python).
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=${1:-wheels} version=${2:-3.12} python=${PIP_PYTHON:-.venv/bin/python}

locked() { # NAME==VERSION as in the lock
  grep -iE "^$(sed 's/_/[-_]/g' <<<"$1")==" requirements.lock | sed 's/ *[;\\].*//' | head -n 1 | grep . ||
    { echo "$0: requirements.lock has no $1" >&2; exit 1; }
}

mkdir -p "$folder"
# Two versions of a package would stop the installation.
[ -z "$(find "$folder" -name '*.whl')" ] || { echo "$0: $folder has wheels already; remove it or name another" >&2; exit 1; }
plain=() compiled=()
for name in annotated_types braceexpand cloudpickle hjson pydantic submitit timm typing_inspection webdataset; do plain+=("$(locked $name)"); done
for name in pydantic_core simplejpeg; do compiled+=("$(locked $name)"); done
deepspeed=$(locked deepspeed)

pip() { "$python" -m pip --disable-pip-version-check "$@"; }
# braceexpand and the like may have no wheel: built here, since they are Python alone.
pip wheel -q --no-deps --wheel-dir "$folder" "${plain[@]}"
# pip takes each platform tag by its letter.
platforms=(manylinux_2_28_x86_64 manylinux_2_27_x86_64 manylinux_2_24_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64 manylinux1_x86_64)
pip download -q --no-deps --only-binary=:all: --implementation cp --python-version "$version" "${platforms[@]/#/--platform=}" --dest "$folder" "${compiled[@]}"
DS_BUILD_OPS=0 pip wheel -q --no-deps --no-build-isolation --wheel-dir "$folder" "$deepspeed"

foreign=$(find "$folder" -name '*.whl' ! -name '*-none-any.whl' ! -name "*-cp${version/./}-*" ! -name '*-abi3-*')
[ -z "$foreign" ] || { echo "$0: not for Python $version: $foreign" >&2; exit 1; }
(cd "$folder" && ls -l -- *.whl | awk '{ printf "%9d  %s\n", $5, $NF; sum += $5 } END { printf "%9d  in %d wheels\n", sum, NR }')
