#!/bin/sh
# page.sh: builds the query page into ontology/http/page/dist, from YASGUI (npm). Without npm it says so and goes on.
set -eu
cd "$(dirname "$0")/../ontology/http/page"
command -v npm >/dev/null 2>&1 || {
    echo "the query page is not built: npm is not installed (apt-get install npm)" >&2
    exit 0
}
echo "building the query page"
npm ci --ignore-scripts --no-audit --no-fund --loglevel=error || {
    echo "the query page could not be built; going on without" >&2
    exit 0
}
rm -rf dist
mkdir dist
cp node_modules/@zazuko/yasgui/build/yasgui.min.js node_modules/@zazuko/yasgui/build/yasgui.min.css dist/
cp index.html page.css page.js icon.svg dist/
