#!/usr/bin/env bash
# The suite with other versions of Python, PyTorch and Transformers: a virtual environment for each row, and a table.
#
#     scripts/checks/versions.sh                                             # all rows, all that needs no GPU
#     ROWS="3.10/2.9.1/5.17.0" scripts/checks/versions.sh tests/layers tests/engines
#
# Goes on where it was stopped: an environment that is there and a row with a result are not made again (delete
# build/versions, or the row's folder in it, to begin anew). PyTorch for Linux brings CUDA: some 6 GB for a row.
set -euo pipefail
cd "$(dirname "$0")/../.."
ROWS=${ROWS:-"3.10/2.9.1/5.17.0 3.12/2.11.0/5.17.0 3.11/2.13.0/5.23.0 3.13/2.14.0/5.24.0"}
TESTS=${*:-tests}
FOLDER=${FOLDER:-build/versions}
mkdir -p "$FOLDER"

find_python() {  # 3.10 -> an interpreter of it
    for found in $(command -v "python$1") "$HOME"/.pyenv/versions/"$1".*/bin/python; do
        "$found" -c '' 2>/dev/null && echo "$found" && return
    done
}

install() {  # folder, python, torch, transformers, extra
    [ -e "$1/.installed" ] && return
    local interpreter
    interpreter=$(find_python "$2")
    [ -n "$interpreter" ] || { echo "no Python $2 here" >&2; return 1; }
    rm -rf "$1"
    "$interpreter" -m venv "$1" &&
        "$1/bin/python" -m pip install --quiet --no-cache-dir "torch==$3" "transformers==$4" --editable ".[$5]" &&
        touch "$1/.installed"
}

run() {  # folder: the last line of pytest, kept beside the environment
    local result
    result="$1/result.$(echo "$TESTS" | tr -c 'a-zA-Z0-9\n' '_')"
    if [ ! -s "$result" ]; then
        # Each row alone knows what it runs: a Triton that `pip` brought is another for each PyTorch.
        "$1/bin/python" -m pytest $TESTS >"$1/log" 2>&1 || true
        grep -E '(passed|failed|error).* in [0-9.]+s' "$1/log" | tail -n 1 | tr -d '=' >"$result"
        [ -s "$result" ] || { tail -n 3 "$1/log" >&2; echo "did not finish" >"$result"; }
    fi
    cat "$result"
}

echo "| Python | PyTorch | Triton | Transformers | $TESTS |"
echo "|---|---|---|---|---|"
for row in $ROWS; do
    IFS=/ read -r python torch transformers <<<"$row"
    folder="$FOLDER/${row//\//-}"
    extra=test-core # the exporters for other runtimes need Transformers 5.23
    [ "$(printf '5.23\n%s' "$transformers" | sort -V | head -n 1)" = 5.23 ] && extra=test
    if ! install "$folder" "$python" "$torch" "$transformers" "$extra" >"$folder.install" 2>&1; then
        echo "| $python | $torch | | $transformers | not installed: $(tail -n 1 "$folder.install") |"
        continue
    fi
    triton=$("$folder/bin/python" -c 'from importlib.metadata import version; print(version("triton"))' 2>/dev/null || true)
    echo "| $python | $torch | $triton | $transformers | $(run "$folder") |"
done
