#!/bin/bash
# A real S3 server for tests: Ceph radosgw over a memory store, without systemd. Starts in about 13 s on free ports.
#
#   ceph-radosgw.sh install            installs the Debian packages (root; about 60 MB)
#   ceph-radosgw.sh start DIR          starts a fresh server in DIR (wiped), makes the bucket, prints DIR/env
#   ceph-radosgw.sh env DIR            prints the environment of the S3 tests: eval "$(ceph-radosgw.sh env DIR)"
#   ceph-radosgw.sh kill-gateway DIR   kills the S3 gateway only (its data stay): a store that stopped answering
#   ceph-radosgw.sh start-gateway DIR  starts the gateway again, on the same port
#   ceph-radosgw.sh stop DIR           ends everything
#
# Keys are ak / sk, the bucket is kvtier-test. Only processes whose pid files lie in DIR/run are ever signalled.
set -u
# Where the gateway listens: an address that others reach, when they run in network namespaces.
ADDRESS=${KVTIER_S3_ADDRESS:-127.0.0.1}
BUCKET=kvtier-test
ATTEMPTS=20

die() { echo "$*" >&2; exit 1; }

# A TCP port that nobody listens on now.
free_port() {
  python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

# Ends the process of one pid file, if it is the program we started.
end_one() {
  local file=$1 pid
  [ -f "$file" ] || return 0
  pid=$(cat "$file")
  case "$(cat "/proc/$pid/comm" 2>/dev/null)" in
    ceph-mon|ceph-osd|radosgw) kill -9 "$pid" 2>/dev/null ;;
  esac
  while [ -d "/proc/$pid" ] && ! grep -q '^State:.*Z' "/proc/$pid/status" 2>/dev/null; do sleep 0.05; done
  rm -f "$file"
}

end_all() { for file in "$1"/run/*.pid; do end_one "$file"; done; }

write_config() {
  local dir=$1 fsid=$2 mon=$3 s3=$4
  cat > "$dir/ceph.conf" <<C
[global]
fsid = $fsid
mon_host = v1:127.0.0.1:$mon
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
auth_allow_insecure_global_id_reclaim = true
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 4
osd_pool_default_pgp_num = 4
osd_pool_default_pg_autoscale_mode = off
mon_allow_pool_size_one = true
mon_warn_on_pool_no_redundancy = false
osd_crush_chooseleaf_type = 0
mon_data_avail_crit = 1
run_dir = $dir/run
log_file = $dir/log/\$name.log
admin_socket = $dir/run/\$name.asok
pid_file = $dir/run/\$name.pid
setuser_match_path = /
ms_bind_msgr2 = false
public_addr = 127.0.0.1
[mon.a]
mon_data = $dir/mon
mon_addr = 127.0.0.1:$mon
mon_initial_members = a
[osd.0]
osd_data = $dir/osd0
osd_objectstore = memstore
memstore_device_bytes = 4294967296
osd_max_write_size = 128
[client.rgw]
rgw_frontends = beast endpoint=$ADDRESS:$s3
rgw_run_sync_thread = false
rgw_enable_gc_threads = false
rgw_enable_lc_threads = false
rgw_dynamic_resharding = false
C
}

write_env() {
  cat > "$1/env" <<C
export KVTIER_TEST_S3=http://$ADDRESS:$2
export KVTIER_TEST_S3_BUCKET=$BUCKET
export KVTIER_TEST_S3_ACCESS_KEY=ak
export KVTIER_TEST_S3_SECRET_KEY=sk
export KVTIER_TEST_S3_RIG="$(realpath "$0") $1"
C
}

start_gateway() {
  local dir=$1
  . "$dir/env"
  CEPH_CONF=$dir/ceph.conf radosgw -n client.rgw
  for _ in $(seq 200); do
    curl -s -o /dev/null -m 1 "$KVTIER_TEST_S3/" && return 0
    sleep 0.1
  done
  return 1
}

# Signs with version 2 of S3's scheme: one line of openssl.
put() {
  local path=$1 data=$2 date sign
  date=$(date -Ru | sed 's/+0000/GMT/')
  sign=$(printf 'PUT\n\n\n%s\n%s' "$date" "$path" |
    openssl dgst -sha1 -hmac "$KVTIER_TEST_S3_SECRET_KEY" -binary | base64)
  curl -fsS -m 30 -X PUT --data-binary "$data" -H "Content-Type:" -H "Date: $date" \
    -H "Authorization: AWS $KVTIER_TEST_S3_ACCESS_KEY:$sign" "$KVTIER_TEST_S3$path"
}

# The first PUT makes pools, which takes seconds: done here, so that no test waits for it.
make_bucket() { put "/$BUCKET" "" && put "/$BUCKET/warm-up" warm; }

wait_for_osd() {
  for _ in $(seq 40); do
    timeout 5 ceph osd stat 2>/dev/null | grep -q '1 up' && return 0
    sleep 0.2
  done
  return 1
}

start_once() (
  set -e
  dir=$1
  rm -rf "$dir"
  mkdir -p "$dir"/mon "$dir"/osd0 "$dir"/run "$dir"/log
  fsid=$(cat /proc/sys/kernel/random/uuid)
  mon=$(free_port)
  s3=$(free_port)
  write_config "$dir" "$fsid" "$mon" "$s3"
  write_env "$dir" "$s3"
  export CEPH_CONF=$dir/ceph.conf
  monmaptool --create --clobber --fsid "$fsid" --addv a "[v1:127.0.0.1:$mon]" "$dir/monmap" > /dev/null
  ceph-mon -i a --mkfs --monmap "$dir/monmap"
  ceph-mon -i a
  osd=$(cat /proc/sys/kernel/random/uuid)
  timeout 20 ceph osd new "$osd" > /dev/null
  ceph-osd -i 0 --mkfs --osd-uuid "$osd" > /dev/null 2>&1
  ceph-osd -i 0
  timeout 20 ceph osd crush add osd.0 1.0 root=default host=h > /dev/null 2>&1 || true
  wait_for_osd
  timeout 60 radosgw-admin user create --uid t --display-name t --access-key ak --secret-key sk \
    > /dev/null 2> "$dir/log/admin.err"
  start_gateway "$dir"
  make_bucket
)

command=${1:-}
if [ "$command" = install ]; then
  apt-get update && DEBIAN_FRONTEND=noninteractive \
    apt-get install -y --no-install-recommends ceph-mon ceph-osd ceph-common radosgw curl openssl python3
  exit
fi
[ $# -eq 2 ] || { sed -n '2,/^set/{/^#/p}' "$0" >&2; exit 2; }
DIR=$(realpath -m "$2")
# The directory is wiped: only a new, an empty or one of our own is taken.
if [ "$command" = start ] && [ -d "$DIR" ] && [ ! -f "$DIR/ceph.conf" ] && [ -n "$(ls -A "$DIR")" ]; then
  die "$DIR is not empty and not of this script"
fi
case $command in
  start)
    for program in ceph-mon ceph-osd ceph radosgw radosgw-admin curl openssl python3; do
      command -v $program > /dev/null || die "$program is missing: run '$0 install'"
    done
    # The monitor sometimes refuses the first OSD of a fresh cluster ("wrong fsid"): start over.
    for _ in $(seq $ATTEMPTS); do
      end_all "$DIR"
      # Not as a condition: that would switch "set -e" off inside.
      start_once "$DIR"
      status=$?
      if [ $status -eq 0 ]; then cat "$DIR/env"; exit 0; fi
    done
    end_all "$DIR"
    die "radosgw did not start; see $DIR/log" ;;
  env) cat "$DIR/env" ;;
  kill-gateway) end_one "$DIR/run/client.rgw.pid" ;;
  start-gateway) start_gateway "$DIR" ;;
  stop) end_all "$DIR" ;;
  *) die "unknown command: $command" ;;
esac
