#!/usr/bin/env bash
# Print an environment in the lock's form.   Usage: requirements/freeze.sh PYTHON > requirements/lock.txt
#
# Build tags such as `+cpu` are dropped: which build of torch is installed is the machine's
# choice (see PIP_ARGS in requirements/install.sh), the version is ours.
set -euo pipefail
cd "$(dirname "$0")"
left_out=$(sed -E 's/[[:space:]]*#.*//; /^$/d' leave-out.txt | paste -sd'|')
cat <<HEADER
# Every package that Twinpath's extras install on Python 3.11, Linux, CPU. Complete: install it with
#     pip install --no-deps -r requirements/lock.txt
# Made by \`make lock\`; what is left out, and why: requirements/leave-out.txt
HEADER
"$1" -m pip list --format=freeze --exclude-editable \
    | sed -E 's/\+[A-Za-z0-9.]+$//' \
    | grep -viE "^(${left_out})==" \
    | LC_ALL=C sort -f
