#!/usr/bin/env bash
# Make sure that a virtual environment holds this project (editable) with one of its extras.
#
#   .ci/venv.sh DIRECTORY EXTRA [PYTHON]
#
# DIRECTORY/.installed says what is inside: the interpreter and this folder, then a line for each extra with the checksum
# of the pyproject.toml it was installed from. The file is taken away while anything is being installed, so an
# interrupted run leaves an environment without it, and such an environment is made anew.
set -euo pipefail
cd "$(dirname "$0")/.."

directory=$1
extra=$2
python=$(.ci/find_python.sh "${3:-}")
record=$directory/.installed
wanted="$extra $(cksum <pyproject.toml)"

run() {
    echo "+ $*"
    "$@"
}

# The folder is part of it because an editable install and the scripts in bin/ hold absolute paths.
interpreter="$("$python" -VV | head -n 1) at $python for $PWD"
if ! [ -f "$record" ] || [ "$(head -n 1 "$record")" != "$interpreter" ]; then
    [ -e "$directory" ] && echo "$directory is unfinished, or was made by another Python or for another folder"
    rm -f "$record"
    run "$python" -m venv --clear "$directory"
    installed=$interpreter
else
    installed=$(<"$record")
fi

if ! grep -qxF "$wanted" <<<"$installed"; then
    echo "Installing keye-jax[$extra] into $directory (some hundred megabytes and a few minutes the first time)"
    rm -f "$record"
    run "$directory/bin/python" -m pip install --disable-pip-version-check --editable ".[$extra]"
    installed=$(grep -v "^$extra " <<<"$installed")
    installed+=$'\n'$wanted
fi
echo "$installed" >"$record"
