#!/usr/bin/env bash
# Checks that need no test run. `lint.sh light` leaves out clippy, which compiles everything once more.
set -uo pipefail
. "$(dirname "$0")/lib.sh"

failed=0
check() {
  say "$1"
  shift
  "$@" || { failed=1; say "FAILED: $*"; }
}

shell_syntax() {
  local file bad=0
  while IFS= read -r file; do
    case $(head -c 64 "$file") in '#!'*bash*|'# Shared'*) bash -n "$file" || bad=1 ;; esac
  done < <(find .ci scripts tests -type f \( -name '*.sh' -o -name run \))
  return $bad
}

python_syntax() {
  find .ci scripts python tests -name '*.py' -print0 |
    xargs -0 -r python3 -c 'import ast, sys; [ast.parse(open(f, encoding="utf-8").read(), f) for f in sys.argv[1:]]'
}

check "format" cargo fmt --all --check
check "dependencies between crates" python3 .ci/check_deps.py
check "walls and texts" python3 .ci/check_house.py
check "shell scripts" shell_syntax
check "python files" python_syntax
if [ "${1:-}" != light ]; then
  KVTIERD=$([ -x "$TARGET/debug/kvtierd" ] && echo "$TARGET/debug/kvtierd") check "Helm chart and Containerfile" bash scripts/check-deploy.sh
fi
# Out of date is a note and no fault: the map is written anew by one command.
python3 scripts/rooms.py --check
if [ "${1:-}" != light ]; then
  check "clippy" cargo clippy --workspace --all-targets --locked -- -D warnings
  check "what the feature verbs compiles against" bash scripts/install-deps.sh verbs
  check "feature verbs" cargo clippy -p kvtier-transport --features verbs --locked -- -D warnings
  if cargo deny --version > /dev/null 2>&1; then
    check "licences, bans and sources" cargo deny --locked check bans licenses sources
  else
    say "cargo-deny is not installed: deny.toml is not checked (cargo install --locked cargo-deny)"
  fi
fi
exit $failed
