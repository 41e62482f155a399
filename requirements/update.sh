#!/usr/bin/env bash
# Resolve every extra afresh and write requirements/lock.txt.   Usage: requirements/update.sh
#
# The lock is complete: it is installed with `pip install --no-deps`, so that what
# requirements/leave-out.txt names stays out although a dependency's metadata asks for it.
# Needs Python 3.11 and about 6 GB below ${TMPDIR:-/tmp} while it runs.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(requirements/find-python.sh)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

for list in constraints also; do
    sed -E 's/[[:space:]]*#.*//; /^$/d' "requirements/$list.in" > "$work/$list.txt"
done
"$python" -m venv "$work/venv"
pip() { "$work/venv/bin/pip" "$@" 2> >(grep -v 'is ignored: it is neither a file' >&2); }
echo "resolving the extras (several minutes)"
pip install -q --upgrade --no-compile -c "$work/constraints.txt" setuptools wheel
pip install -q --no-compile --no-build-isolation \
    -c "$work/constraints.txt" -r "$work/also.txt" ".[all]"
requirements/freeze.sh "$work/venv/bin/python" > "$work/lock.txt"
cp "$work/lock.txt" requirements/lock.txt
echo "requirements/lock.txt: $(grep -c == requirements/lock.txt) packages"
