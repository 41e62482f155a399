#!/usr/bin/env bash
# Print the path of a Python 3.11 that can make virtual environments.
# PYTHON, where set, is the only candidate.
set -euo pipefail
probe='import sys, venv, ensurepip; assert sys.version_info[:2] == (3, 11); print(sys.executable)'
for candidate in ${PYTHON:-python3.11 /usr/bin/python3.11 python3 python}; do
    if found=$("$candidate" -c "$probe" 2>/dev/null); then
        echo "$found"
        exit 0
    fi
done
cat >&2 <<TEXT
No usable Python 3.11 found (tried: ${PYTHON:-python3.11, /usr/bin/python3.11, python3, python}).
The locked packages are for Python 3.11, with its venv module. On Debian or Ubuntu:
    apt-get install python3.11 python3.11-venv
or name one:  make setup PYTHON=/path/to/python3.11
TEXT
exit 1
