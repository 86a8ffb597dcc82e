#!/bin/sh
# Remakes the lock files from pyproject.toml and runtime.in: `requirements/lock.sh` keeps what is locked where it still
# fits, `requirements/lock.sh --upgrade` takes the newest. Needs uv. Registries come from uv's own configuration and are
# not written down.
set -eu
cd -- "$(dirname -- "$0")/.."

lock() {
    out=$1
    shift
    uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate \
        --custom-compile-command requirements/lock.sh --output-file "$out" "$@"
}

lock requirements/runtime.txt --extra local --extra meaning pyproject.toml requirements/runtime.in "$@"
lock requirements/test.txt --extra local --extra meaning --extra otel --extra test --constraint requirements/runtime.txt \
    pyproject.toml requirements/runtime.in "$@"

# test.txt has all that runtime.txt has.
wheels=$(mktemp -d)
trap 'rm -r "$wheels"' EXIT
uv pip compile --quiet --universal --python-version 3.11 --no-deps --format pylock.toml --output-file "$wheels/pylock.toml" \
    requirements/test.txt
python3 requirements/list_wheels.py "$wheels/pylock.toml" requirements/test.txt >requirements/wheels.txt
