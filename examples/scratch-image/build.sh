#!/bin/sh
# Builds the image poold-example-scratch:1. Needs a C compiler that can link statically (Debian: gcc libc6-dev) and docker.
# With --context only the program, ./server, that the Dockerfile copies.
set -eu
cd "$(dirname "$0")"
if ! command -v "${CC:-cc}" >/dev/null; then
  echo "build.sh: there is no C compiler: apt-get install gcc libc6-dev (or set CC)" >&2
  exit 1
fi
"${CC:-cc}" -O2 -Wall -Wextra -static -s -o server server.c
[ "${1:-}" = --context ] || docker build -q -t poold-example-scratch:1 .
