/* The C interface as a C program sees it: layouts, error paths, a session without a daemon. Run by tests/abi.rs. */
#include "kvtier.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define CHECK(condition)                                                         \
  do {                                                                           \
    if (!(condition)) {                                                          \
      fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition);    \
      exit(1);                                                                   \
    }                                                                            \
  } while (0)

_Static_assert(sizeof(kvtier_frame) == 80, "kvtier_frame");
_Static_assert(sizeof(kvtier_transfer) == 88, "kvtier_transfer");
_Static_assert(sizeof(kvtier_hit) == 28, "kvtier_hit");
_Static_assert(sizeof(kvtier_region) == 48, "kvtier_region");
_Static_assert(sizeof(kvtier_lookup_request) == 56, "kvtier_lookup_request");
_Static_assert(sizeof(kvtier_reserve_request) == 56, "kvtier_reserve_request");
_Static_assert(offsetof(kvtier_frame, group) == 32 && offsetof(kvtier_frame, offset) == 48, "fields of kvtier_frame");

static const char *SPEC =
    "{\"socket\": \"/nonexistent/kvtierd.sock\", \"engine_id\": \"abi-test\", \"role\": \"scheduler\","
    " \"rank\": 0, \"shard\": 0,"
    " \"namespace\": {\"model\": \"m\", \"weights_digest\": \"w\", \"kv_dtype\": \"bfloat16\", \"quantization\": \"\","
    "  \"adapter_digest\": \"\", \"hash_algorithm\": \"sha256_cbor\", \"hash_seed\": \"0\","
    "  \"hash_block_tokens\": 16, \"revision\": \"\"},"
    " \"layout\": {\"attention_backend\": \"CPU_ATTN\", \"isa\": \"\", \"layout\": \"LBHNC\", \"tensor_parallel\": 1,"
    "  \"pipeline_parallel\": 1, \"prefill_context_parallel\": 1, \"decode_context_parallel\": 1, \"shards\": 1,"
    "  \"groups\": [{\"kind\": \"full\", \"window_tokens\": 0, \"block_tokens\": 16, \"layers\": [\"l0\"]}],"
    "  \"block_bytes\": [4096]},"
    " \"call_timeout_ms\": 200, \"copy_threads\": 1, \"max_inflight\": 4}";

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static void refuses_bad_specs(void) {
  kvtier_session *session = NULL;
  char err[256];
  CHECK(kvtier_session_open("{\"surprise\": 1}", &session, err, sizeof err) == KVTIER_INVALID_ARGUMENT);
  CHECK(session == NULL && strstr(err, "surprise") != NULL);
  CHECK(kvtier_session_open(NULL, &session, NULL, 0) == KVTIER_INVALID_ARGUMENT);
  CHECK(kvtier_session_open(SPEC, NULL, err, sizeof err) == KVTIER_INVALID_ARGUMENT);
}

static void misses_without_a_daemon(kvtier_session *session) {
  uint8_t hashes[64] = {1, 2, 3};
  kvtier_lookup_request request = {.size = sizeof request, .hash_len = 32, .request_id = "r1", .hashes = hashes,
                                   .hash_count = 2, .deadline_ms = 300};
  double start = now();
  CHECK(kvtier_lookup_submit(session, &request) == KVTIER_OK);
  kvtier_hit hit = {.size = sizeof hit, .tokens = 77};
  int32_t status;
  while ((status = kvtier_lookup_poll(session, "r1", 0, 32, &hit)) == KVTIER_PENDING) {
    CHECK(now() - start < 2.0);
  }
  CHECK(status == KVTIER_OK && hit.tokens == 0);
  CHECK(kvtier_lookup_poll(session, "unknown", 0, 32, &hit) == KVTIER_MISS);
  CHECK(kvtier_release(session, "r1", 0, 0, 0) == KVTIER_OK);
  CHECK(kvtier_release(session, "r1", 0, 0, 0) == KVTIER_MISS);
  request.size = 8;
  CHECK(kvtier_lookup_submit(session, &request) == KVTIER_INVALID_ARGUMENT);

  kvtier_reserve_request wish = {.size = sizeof wish, .hash_len = 32, .hashes = hashes, .count = 2};
  uint64_t ticket = 0;
  uint8_t states[2];
  kvtier_frame frames[2];
  CHECK(kvtier_reserve_submit(session, &wish, &ticket) == KVTIER_OK);
  CHECK(kvtier_reserve_poll(session, ticket, states, frames, 2) == KVTIER_MISS);
}

static void loses_jobs_without_a_daemon(kvtier_session *session) {
  uint8_t *memory = aligned_alloc(4096, 4 * 4096);
  kvtier_region region = {.size = sizeof region, .base = (uint64_t)(uintptr_t)memory, .span_bytes = 4 * 4096,
                          .block_stride = 4096, .run_bytes = 4096, .block_count = 4};
  CHECK(kvtier_register_regions(session, &region, 1) == KVTIER_OK);
  kvtier_transfer transfer = {.frame = {.key = {1}, .bytes = 4096, .generation = 1}, .block_id = 3};
  uint64_t job = 0;
  uint8_t result = 0;
  CHECK(kvtier_save_submit(session, &transfer, 1, 1000, 0, &job) == KVTIER_OK);
  CHECK(kvtier_job_wait(session, job, 1000, &result, 1) == KVTIER_OK && result == KVTIER_TRANSFER_LOST);
  transfer.block_id = 4;
  CHECK(kvtier_load_submit(session, "r1", &transfer, 1, 1000, 0, &job) == KVTIER_INVALID_ARGUMENT);
}

static void refuses_a_forked_child(kvtier_session *session) {
  pid_t child = fork();
  CHECK(child >= 0);
  if (child == 0) {
    int32_t state;
    int forked = kvtier_session_state(session, &state, NULL, 0) == KVTIER_FORKED;
    kvtier_session_close(session, 10000);
    kvtier_session *own = NULL;
    int opened = kvtier_session_open(SPEC, &own, NULL, 0) == KVTIER_OK;
    kvtier_session_close(own, 1000);
    _exit(forked && opened ? 0 : 1);
  }
  int status = -1;
  CHECK(waitpid(child, &status, 0) == child);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

int main(void) {
  CHECK(kvtier_abi_version() == KVTIER_ABI_VERSION);
  refuses_bad_specs();
  kvtier_session *session = NULL;
  char text[8192];
  double start = now();
  CHECK(kvtier_session_open(SPEC, &session, text, sizeof text) == KVTIER_OK && session != NULL);
  CHECK(now() - start < 1.0);
  int32_t state = -1;
  CHECK(kvtier_session_state(session, &state, text, sizeof text) == KVTIER_OK && state == KVTIER_STATE_ABSENT);
  misses_without_a_daemon(session);
  loses_jobs_without_a_daemon(session);
  CHECK(kvtier_switch_namespace(session, "weights-2") == KVTIER_OK);
  CHECK(kvtier_counters(session, text, 4) == KVTIER_BUFFER_TOO_SMALL);
  CHECK(kvtier_counters(session, text, sizeof text) == KVTIER_OK && strstr(text, "\"lookups\":1") != NULL);
  CHECK(kvtier_weights_digest("/nonexistent", text, sizeof text) == KVTIER_IO);
  refuses_a_forked_child(session);
  start = now();
  kvtier_session_close(session, 5000);
  CHECK(now() - start < 3.0);
  CHECK(kvtier_release(session, "r1", 0, 0, 0) == KVTIER_CLOSED);
  kvtier_session_close(session, 5000);
  puts("abi.c: ok");
  return 0;
}
