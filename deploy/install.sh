#!/bin/sh
# Installs the balancer as a systemd service, or upgrades it: sudo deploy/install.sh
#
# A virtual environment in $PREFIX, a unit and a socket, /etc/default/ollama-balancer and
# /etc/ollama-balancer/config.yaml. The last two are yours: they are never overwritten. Nothing is
# started. Run it again after `git pull`.
#
#   PREFIX=/opt/ollama-balancer   where the program goes; not below /home
#   DESTDIR=                      a folder to write everything below, as for a package
#   PYTHON=python3                3.11 or newer, with its venv module
#
# Uninstall:
#   systemctl disable --now ollama-balancer.service ollama-balancer.socket
#   rm -r /opt/ollama-balancer /etc/systemd/system/ollama-balancer.service \
#     /etc/systemd/system/ollama-balancer.socket && systemctl daemon-reload
#   and, if nothing of it is wanted any more:
#   rm -r /etc/ollama-balancer /etc/default/ollama-balancer /var/lib/private/ollama-balancer

set -eu

PREFIX=${PREFIX:-/opt/ollama-balancer}
DESTDIR=${DESTDIR:-}
PYTHON=${PYTHON:-python3}
SOURCE=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
VENV=$DESTDIR$PREFIX

fail() {
  echo "$*" >&2
  exit 1
}

case $PREFIX in
  /home/* | /root/* | /run/user/*) fail "PREFIX=$PREFIX: the service may not look into homes." ;;
  /*) ;;
  *) fail "PREFIX=$PREFIX: needs an absolute path." ;;
esac
if [ -z "$DESTDIR" ] && [ "$(id -u)" -ne 0 ]; then
  fail "This writes to $PREFIX and /etc: run it with sudo. For a service of your own instead:
pipx install $SOURCE && ollama-balancer install --user"
fi
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  fail "Python 3.11 or newer is needed; name it: PYTHON=python3.12 $0"
"$PYTHON" -c 'import ensurepip, venv' 2>/dev/null ||
  fail "The venv module of Python is missing: apt install python3-venv"

if [ -x "$VENV/bin/python" ]; then
  echo "upgrading $VENV"
else
  echo "creating  $VENV"
  "$PYTHON" -m venv "$VENV"
fi
"$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --upgrade \
  -c "$SOURCE/constraints.txt" "$SOURCE"
chmod -R go=u-w "$VENV"
if [ -n "$DESTDIR" ]; then # what was staged is to run where it will be
  grep -rlI "$VENV" "$VENV/bin" "$VENV/pyvenv.cfg" | while read -r file; do
    sed -i "s|$VENV|$PREFIX|g" "$file"
  done
fi
exec "$VENV/bin/python" -m balancer install --system --root "$DESTDIR"
