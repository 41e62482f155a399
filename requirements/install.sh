#!/usr/bin/env bash
# Install the lock and the project into a virtual environment.   Usage: requirements/install.sh VENV
#
# Idempotent: an environment that exists is brought to the lock, and what the lock does not
# name is removed from it. PIP_ARGS holds further options for pip; where the default index has only
# CUDA builds of torch, it points pip at the CPU ones (--extra-index-url or --find-links).
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1
lock=requirements/lock.txt
export PIP_ROOT_USER_ACTION=ignore PIP_DISABLE_PIP_VERSION_CHECK=1
say() { printf 'setup: %s\n' "$*"; }
# A machine with several indexes has one warning for each package that one of them lacks.
without_noise() { grep -v 'is ignored: it is neither a file' >&2 || true; }
pip() { "$venv/bin/python" -m pip "$@" 2> >(without_noise); }

# A venv whose interpreter is gone or is another version is of no use.
if ! "$venv/bin/python" -c 'import sys, pip; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
    python=$(requirements/find-python.sh)
    say "making $venv with $("$python" -V) ($python)"
    rm -rf "$venv"
    "$python" -m venv "$venv"
fi

say "installing $(grep -c == "$lock") pinned packages; the first time this takes some minutes"
started=$SECONDS
grep -E '^(setuptools|wheel)==' "$lock" > "$venv/build-backend.txt"
# shellcheck disable=SC2086  # PIP_ARGS is a list of options
pip install -q --no-deps ${PIP_ARGS:-} -r "$venv/build-backend.txt"
# Source distributions build with the backend installed above: no build pulls anything unpinned.
# shellcheck disable=SC2086
"$venv/bin/python" -m pip install -q --no-deps --no-build-isolation --no-compile ${PIP_ARGS:-} \
    -r "$lock" 2> >(without_noise) &
installer=$!
trap 'kill "$installer" 2>/dev/null || true' EXIT  # interrupted: no pip goes on alone
while kill -0 "$installer" 2>/dev/null; do
    for _ in $(seq 15); do
        sleep 1
        kill -0 "$installer" 2>/dev/null || break
    done
    say "  $((SECONDS - started)) s, $(find "$venv/lib" -maxdepth 3 -name '*.dist-info' | wc -l) packages in place"
done
trap - EXIT
wait "$installer"

normalise() { sed -E 's/==.*//; s/[-_.]+/-/g' | tr '[:upper:]' '[:lower:]' | LC_ALL=C sort -u; }
stale=$(LC_ALL=C comm -13 <(grep == "$lock" | normalise) \
    <(pip list --format=freeze | normalise) | grep -vxE 'pip|twinpath' || true)
if [ -n "$stale" ]; then
    say "removing what the lock does not name:" $stale
    # shellcheck disable=SC2086
    pip uninstall -q -y $stale
fi

pip install -q --no-deps --no-build-isolation --no-compile -e .

# On all cores, and after pip, which would do it on one. Tests and single model architectures
# are left to their first import; templates that are no Python are passed over.
say "compiling"
"$venv/bin/python" -m compileall -qq -j 0 \
    -x '/tests?/|/(transformers|vllm/model_executor)/models/' "$venv"/lib/python3.11/site-packages || true

say "checking the installation"
if ! "$venv/bin/python" -c 'import torch, transformers'; then
    cat >&2 <<TEXT
setup: torch does not load. The default index may have offered a build for CUDA; point pip at a
setup: CPU build:  make setup PIP_ARGS='--extra-index-url <index of the CPU builds of torch>'
TEXT
    exit 1
fi
say "done in $((SECONDS - started)) s: $("$venv/bin/python" -c \
    'import torch; print("torch", torch.__version__)'), $(du -sh "$venv" | cut -f1) in $venv"
