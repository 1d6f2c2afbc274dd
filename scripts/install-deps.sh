#!/usr/bin/env bash
# Installs what is missing to build and test on Debian or Ubuntu; does nothing, and needs no rights, when nothing is.
#
#   install-deps.sh          a C compiler (the TLS library and the C test), python3 with venv, libnuma (vLLM), curl
#   install-deps.sh s3       the same and a real S3 server for the object tier's tests (Ceph radosgw, 60 MB)
#   install-deps.sh cluster  the same as the first and a real directory (redis-server), UCX, and ip for network namespaces
#   install-deps.sh verbs    the same as the first and what the optional feature `verbs` compiles against
# Several words may be given.
set -euo pipefail
. "$(dirname "$0")/lib.sh"

missing=()
command -v cc > /dev/null || missing+=(build-essential)
# vLLM compiles kernels at run time with the C++ compiler.
command -v c++ > /dev/null || missing+=(build-essential)
command -v python3 > /dev/null || missing+=(python3)
python3 -c 'import ensurepip, venv' 2> /dev/null || missing+=(python3-venv)
ldconfig -p 2> /dev/null | grep -q 'libnuma\.so\.1' || [ -n "$(find /usr/lib /lib -name 'libnuma.so.1' -print -quit 2> /dev/null)" ] || missing+=(libnuma1)
command -v curl > /dev/null || missing+=(curl)
[ -e /etc/ssl/certs/ca-certificates.crt ] || missing+=(ca-certificates)
wants() { case " $words " in *" $1 "*) return 0 ;; *) return 1 ;; esac; }
words="$*"
if wants s3; then
  command -v ceph-mon > /dev/null || missing+=(ceph-mon)
  command -v ceph-osd > /dev/null || missing+=(ceph-osd)
  command -v ceph > /dev/null || missing+=(ceph-common)
  command -v radosgw > /dev/null || missing+=(radosgw)
fi
if wants cluster; then
  # Where the system has Valkey, it is as good.
  command -v valkey-server > /dev/null || command -v redis-server > /dev/null || missing+=(redis-server redis-tools)
  command -v ucx_perftest > /dev/null || missing+=(ucx-utils)
  ldconfig -p 2> /dev/null | grep -q 'libucp\.so\.0' || missing+=(libucx0)
  command -v ip > /dev/null || missing+=(iproute2)
fi
if wants verbs; then
  [ -e /usr/include/infiniband/verbs.h ] || missing+=(libibverbs-dev)
  [ -e /usr/include/rdma/rdma_cma.h ] || missing+=(librdmacm-dev)
  command -v pkg-config > /dev/null || missing+=(pkg-config)
  command -v clang > /dev/null || missing+=(clang libclang-dev)
fi

if [ ${#missing[@]} -gt 0 ]; then
  list=$(printf '%s\n' "${missing[@]}" | sort -u | tr '\n' ' ')
  command -v apt-get > /dev/null || die "missing: $list(names of Debian's packages): install them with this system's package manager"
  as_root true || die "missing: $list- this user is not root and may not use sudo: become root, or run: apt-get install $list"
  say "installing $list"
  log=$(mktemp)
  trap 'rm -f "$log"' EXIT
  # Another apt may be at work, as after a machine's start. Its texts are looked at: in one language.
  apt() {
    as_root env LC_ALL=C DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=120 "$@" 2>&1 < /dev/null | tee "$log" >&2
  }
  # That option is for dpkg's locks only: for the lock of the lists, which `update` takes, apt does not wait.
  tries=0
  until apt update; do
    tries=$((tries + 1))
    grep -q 'Could not get lock' "$log" && [ "$tries" -lt 24 ] || die "apt-get update failed: $(tail -n 1 "$log")"
    sleep 5
  done
  # shellcheck disable=SC2086
  apt install -y --no-install-recommends $list || die "apt-get could not install ${list% }: $(tail -n 1 "$log")"
fi

if ! command -v cargo > /dev/null; then
  [ -x "$HOME/.cargo/bin/cargo" ] && die "cargo is in ~/.cargo/bin but not in PATH: run '. ~/.cargo/env' first"
  die "Rust is not installed: install rustup, which then takes the toolchain that rust-toolchain.toml names"
fi
cargo --version > /dev/null 2>&1 ||
  die "the toolchain of rust-toolchain.toml cannot be used: run 'rustup toolchain install $(sed -n 's/^channel = "\(.*\)"/\1/p' rust-toolchain.toml)'"
