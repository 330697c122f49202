#!/usr/bin/env bash
# Print the path of a Python interpreter that can make environments here, or say why there is none.
#
#   .ci/find_python.sh [COMMAND]     COMMAND: use this one; default: the first of python3, python3.14 ... that fits
#
# A candidate is run, not merely looked up: version managers put commands on PATH that only print an error. What is
# printed is the base interpreter, so that an activated environment does not become the parent of another one.
set -euo pipefail

probe='
import ensurepip, os, sys, venv
if sys.version_info < (3, 11):
    sys.exit("it is Python %d.%d; 3.11 or newer is needed" % sys.version_info[:2])
print(os.path.realpath(getattr(sys, "_base_executable", sys.executable)))
'

if [ "${1:-}" ]; then
    "$1" -c "$probe" && exit
    echo "error: PYTHON=$1 cannot be used (see above)" >&2
    exit 1
fi

candidates=(python3 python3.14 python3.13 python3.12 python3.11 python)
for candidate in "${candidates[@]}"; do
    "$candidate" -c "$probe" 2>/dev/null && exit
done
echo "error: no Python >= 3.11 with the venv and ensurepip modules found (tried: ${candidates[*]})." >&2
echo "Install one (Debian and Ubuntu: apt install python3 python3-venv), or name it: make PYTHON=/path/to/python3" >&2
exit 1
