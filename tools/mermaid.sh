#!/bin/sh
# mermaid.sh: fetches the script that draws the documentation's diagrams into build/mermaid.min.js, from npm, and checks it.
set -eu
cd "$(dirname "$0")/.."
version=11.17.2
sum=581ed7d74bd9048d0e3a91363927d72ef22942d7722546b27f7cc29e35390eb8
check() { echo "$sum  build/mermaid.min.js" | sha256sum --check --status 2>/dev/null; }
check && exit 0
command -v npm >/dev/null 2>&1 || {
    echo "error: the diagrams need mermaid, which npm brings; npm is not installed (apt-get install npm)" >&2
    exit 2
}
mkdir -p build/mermaid
(cd build/mermaid && npm pack --silent "mermaid@$version" >/dev/null && tar xzf "mermaid-$version.tgz" package/dist/mermaid.min.js)
mv build/mermaid/package/dist/mermaid.min.js build/
rm -r build/mermaid
check || {
    echo "error: build/mermaid.min.js is not mermaid $version" >&2
    exit 2
}
