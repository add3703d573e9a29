#!/usr/bin/env bash
# What the tests need of the machine, beside what pip brings.
#   scripts/needs.sh           prints the Debian packages that are missing, one a line
#   scripts/needs.sh --check   fails with the command that installs them, or with what else is wrong
set -euo pipefail
PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin"

missing=()
# need PACKAGE COMMAND...: PACKAGE is missing unless every COMMAND is there
need() {
  local package=$1 command
  shift
  for command in "$@"; do
    if ! command -v "$command" >/dev/null; then
      missing+=("$package")
      return
    fi
  done
}

need make make
need git git
need curl curl
need bubblewrap bwrap
need util-linux unshare nsenter
need iproute2 ip
need procps ps
need nodejs node
need gcc gcc
need binutils ld
need systemd systemd-analyze systemd-sysusers systemd-tmpfiles
[ -e /sbin/init ] || missing+=(systemd-sysv)
need dbus-daemon dbus-daemon
need python3 /usr/bin/python3
/usr/bin/python3 -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
# busybox of the package busybox-static stands alone in an image; the plain package's needs libc.
if ! command -v busybox >/dev/null || ldd "$(command -v busybox)" >/dev/null 2>&1; then missing+=(busybox-static); fi
[ -e /usr/lib/x86_64-linux-gnu/libc.a ] || [ -e "/usr/lib/$(uname -m)-linux-gnu/libc.a" ] || missing+=(libc6-dev)
if [ -z "${DOCKER_HOST:-}" ]; then
  need docker.io dockerd
  need iptables iptables
fi

if [ "${1:-}" != --check ]; then
  [ ${#missing[@]} -eq 0 ] || printf '%s\n' "${missing[@]}"
  exit 0
fi

if [ ${#missing[@]} -gt 0 ]; then
  echo "make test: the tests run real containers and sandboxes and need programs that are not installed here:" >&2
  echo "    apt-get update && apt-get install --no-install-recommends ${missing[*]}" >&2
  exit 1
fi
if [ "$(id -u)" -ne 0 ]; then
  echo "make test: the tests start a private Docker engine and enter network namespaces: run it as root" >&2
  exit 1
fi
