#!/bin/sh
# Builds the image poold-example-fc-container:1 without a registry: the host's node and the libraries it is linked with.
# With --context only the directory ./root that the Dockerfile copies.
set -eu
cd "$(dirname "$0")"
if ! node=$(command -v node); then
  echo "build.sh: there is no node here: apt-get install nodejs" >&2
  exit 1
fi
rm -rf root
mkdir -p root/usr/bin root/usr/src/app
cp -L "$node" root/usr/bin/node
# ldd prints `name => path (address)`, and the loader as `path (address)`.
ldd "$node" | grep -o '/[^ ]*' | sort -u | while read -r library; do
  mkdir -p "root$(dirname "$library")"
  cp -L "$library" "root$library"
done
[ "${1:-}" = --context ] || docker build -q -t poold-example-fc-container:1 .
