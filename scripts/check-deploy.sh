#!/usr/bin/env bash
# Renders the Helm chart with Helm's own code and validates what comes out, without a cluster; checks the Containerfile and the
# documents' snippets too. Ends non-zero when anything is wrong.
#
#   KVTIERD=target/debug/kvtierd scripts/check-deploy.sh    also lets the daemon judge each rendered kvtier.toml
#   KVTIER_SKIP=deploy                                      does without all of it
#
# Its Python environment (400 MB) is made once and kept in KVTIER_CACHE, ~/.cache/kvtier.
set -euo pipefail
. "$(dirname "$0")/lib.sh"

skipped deploy && { say "skipped: check-deploy (KVTIER_SKIP)"; exit 0; }
# The wheel with Helm inside is built for Linux on x86-64.
[ "$(uname -sm)" = "Linux x86_64" ] || { say "skipped: check-deploy needs Linux on x86-64, this is $(uname -sm)"; exit 0; }
python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || die "check-deploy needs Python 3.10 or later"
python3 -c 'import ensurepip, venv' 2> /dev/null || bash scripts/install-deps.sh

# One environment per list of requirements; a half-made one is never taken.
cache=${KVTIER_CACHE:-$HOME/.cache/kvtier}
venv=$cache/deploy-$(sha256sum deploy/requirements.txt | cut -c 1-12)
mkdir -p "$cache"
exec 9> "$cache/deploy.lock"
flock 9
if [ ! -e "$venv/ready" ]; then
  say "making the environment of check-deploy in $venv"
  rm -rf "$venv"
  python3 -m venv "$venv"
  "$venv/bin/pip" install --quiet --disable-pip-version-check -r deploy/requirements.txt >&2 < /dev/null
  touch "$venv/ready"
fi
flock -u 9

if [ -n "${KVTIERD:-}" ]; then
  [ -x "$KVTIERD" ] || die "KVTIERD=$KVTIERD is no program"
  KVTIERD=$(realpath "$KVTIERD")
  export KVTIERD
else
  unset KVTIERD
fi
cd deploy
PYTHONDONTWRITEBYTECODE=1 exec "$venv/bin/python" -m checks
