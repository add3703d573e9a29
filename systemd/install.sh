#!/usr/bin/env bash
# Install poold as a systemd service, or take it away again. Run it as often as you like: it leaves alone what is
# already as it should be, never overwrites the configuration, and says what it did.
set -euo pipefail

usage() {
  cat <<'USAGE'
usage: install.sh [options]
  --prefix DIR       where the program goes (/opt/poold): a virtual environment of its own
  --wheel FILE       install this wheel instead of the checkout that this script lies in
  --find-links DIR   take every package from DIR and ask no index (for a machine without a network)
  --python FILE      the Python to use, 3.11 or newer (python3)
  --root DIR         stage below DIR: nothing of the running system is changed
  --uninstall        stop and remove the service and the program; keep configuration, functions and logs
  --purge            with --uninstall: remove those too
USAGE
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
prefix=/opt/poold
source=$(dirname "$here")
find_links=
python=python3
root=
action=install
purge=no

fail() {
  echo "install.sh: $1" >&2
  exit "${2:-1}"
}

while [ $# -gt 0 ]; do
  case $1 in
    --prefix | --wheel | --find-links | --python | --root)
      [ $# -ge 2 ] || fail "$1 needs a value" 2
      case $1 in
        --prefix) prefix=${2%/} ;;
        --wheel) source=$(realpath -- "$2") || fail "no such wheel: $2" ;;
        --find-links) find_links=$(realpath -- "$2") || fail "no such directory: $2" ;;
        --python) python=$2 ;;
        --root) root=$(realpath -m -- "$2") ;;
      esac
      shift 2
      ;;
    --uninstall) action=uninstall; shift ;;
    --purge) purge=yes; shift ;;
    --help | -h) usage; exit 0 ;;
    *) usage >&2; fail "unknown option $1" 2 ;;
  esac
done

# It goes into the units and the scripts' first lines, which take no spaces.
[[ $prefix =~ ^/[A-Za-z0-9._/-]+$ ]] || fail "--prefix must be an absolute path of letters, digits and ._-/, not '$prefix'" 2
[ "$root" != / ] || root=
[ "$purge" = no ] || [ "$action" = uninstall ] || fail "--purge goes with --uninstall" 2
if [ -z "$root" ] && [ "$(id -u)" -ne 0 ]; then
  fail "run it as root (sudo $0), or stage with --root DIR"
fi

units=$root/etc/systemd/system
config=$root/etc/poold/poold.toml
commands=(poold poolctl poolbench)
# With --root the files are for another system; systemd here may also simply not be running.
live=no
[ -n "$root" ] || [ ! -d /run/systemd/system ] || live=yes

said() { printf '  %-10s %s\n' "$1" "${2#"$root"}"; }

# put MODE SOURCE TARGET: copy when it differs
put() {
  if cmp -s "$2" "$3"; then
    said unchanged "$3"
  else
    local verb=installed
    [ ! -e "$3" ] || verb=updated
    install -D -m "$1" "$2" "$3"
    said "$verb" "$3"
  fi
}

take() {
  local path
  for path in "$@"; do
    if [ -e "$path" ] || [ -L "$path" ]; then
      rm -rf -- "$path"
      said removed "$path"
    fi
  done
}

install_program() {
  local venv=$root$prefix version before
  command -v "$python" >/dev/null || fail "no $python here; on Debian and Ubuntu: apt-get install python3 python3-venv"
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$python is $("$python" -V 2>&1); poold needs Python 3.11 or newer: name one with --python"
  "$python" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "$python has no venv module; on Debian and Ubuntu: apt-get install python3-venv"
  if [ -e "$venv" ] && [ ! -e "$venv/pyvenv.cfg" ]; then
    fail "$prefix exists and is no virtual environment; choose another --prefix"
  fi
  before=$("$venv/bin/python" -m pip freeze 2>/dev/null || true)
  [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
  local -a options=(-qq --disable-pip-version-check --no-cache-dir)
  [ -z "$find_links" ] || options+=(--no-index --find-links "$find_links")
  built=$(mktemp -d)
  trap 'rm -rf "$built"' EXIT
  local wheel=$source
  if [ -d "$source" ]; then
    "$venv/bin/python" -m pip wheel "${options[@]}" --no-deps --wheel-dir "$built" "$source" ||
      fail "pip could not build poold from $source"
    wheel=$(echo "$built"/poold-*.whl)
  fi
  "$venv/bin/python" -m pip install "${options[@]}" "$wheel" || fail "pip could not install $wheel into $prefix"
  # A wheel of the same version may hold changed code, so poold itself is always replaced.
  "$venv/bin/python" -m pip install "${options[@]}" --no-deps --force-reinstall "$wheel"
  version=$("$venv/bin/python" -c 'from importlib.metadata import version; print(version("poold"))')
  if [ -n "$root" ]; then
    # The commands must name where they will lie, not where they were staged.
    grep -rlIF -- "$venv" "$venv/bin" "$venv/pyvenv.cfg" | while read -r file; do
      sed -i "s|$venv|$prefix|g" "$file"
    done
  fi
  if [ -z "$before" ]; then said installed "poold $version in $prefix"; else said updated "poold $version in $prefix"; fi
  local command
  mkdir -p "$root/usr/local/bin"
  for command in "${commands[@]}"; do
    ln -sfn "$prefix/bin/$command" "$root/usr/local/bin/$command"
  done
  said linked "$root/usr/local/bin: ${commands[*]}"
}

install_units() {
  local unit copy
  copy=$(mktemp)
  for unit in poold.service poold.socket; do
    sed "s|/opt/poold/|$prefix/|g" "$here/$unit" >"$copy"
    put 0644 "$copy" "$units/$unit"
  done
  rm -f "$copy"
  put 0644 "$here/poold.sysusers" "$root/etc/sysusers.d/poold.conf"
  put 0644 "$here/poold.tmpfiles" "$root/etc/tmpfiles.d/poold.conf"
  if [ -e "$config" ]; then
    said kept "$config"
  else
    put 0640 "$here/poold.toml" "$config"
  fi
  systemd-sysusers ${root:+--root="$root"} poold.conf
  if [ -z "$root" ]; then
    systemd-tmpfiles --create poold.conf
  fi
}

case $action in
  install)
    echo "poold: installing${root:+ below $root}"
    install_program
    install_units
    if [ "$live" = yes ]; then
      systemctl daemon-reload
    fi
    if [ "$live" = yes ] && systemctl --quiet is-active poold.service; then
      echo "poold runs with the version from before; no connection is refused by: systemctl restart poold"
    elif [ -z "$root" ]; then
      echo "start it, now and at every boot: systemctl enable --now poold.socket poold.service"
      echo "its configuration: /etc/poold/poold.toml; who may administer it: usermod -aG poold NAME"
    fi
    ;;
  uninstall)
    echo "poold: removing${root:+ below $root}"
    if [ "$live" = yes ] && [ -e "$units/poold.service" ]; then
      systemctl --quiet disable --now poold.service poold.socket
      said stopped "poold.service, poold.socket"
    fi
    for command in "${commands[@]}"; do
      if [ "$(readlink "$root/usr/local/bin/$command" || true)" = "$prefix/bin/$command" ]; then
        take "$root/usr/local/bin/$command"
      fi
    done
    take "$units/poold.service" "$units/poold.socket" "$root/etc/sysusers.d/poold.conf" "$root/etc/tmpfiles.d/poold.conf"
    [ ! -e "$root$prefix/pyvenv.cfg" ] || take "$root$prefix"
    if [ "$purge" = yes ]; then
      take "$root/etc/poold" "$root/var/lib/poold" "$root/var/log/poold" "$root/run/poold"
    else
      for path in "$root/etc/poold" "$root/var/lib/poold" "$root/var/log/poold"; do
        [ ! -e "$path" ] || said kept "$path"
      done
    fi
    if [ "$live" = yes ]; then
      systemctl daemon-reload
      systemctl reset-failed poold.service poold.socket 2>/dev/null || true
    fi
    ;;
esac
