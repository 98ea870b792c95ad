#!/bin/sh
# types.sh: the package `tinyfleet` as a folder of links, build/types, for tools that read sources without importing them.
set -eu
cd "$(dirname "$0")/.."
mkdir -p build/types/tinyfleet
for entry in tinyfleet/* edge firmware_tools ontology server; do
    ln -sfn "../../../$entry" "build/types/tinyfleet/$(basename "$entry")"
done
