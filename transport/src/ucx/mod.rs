//! UCX, opened at run time: RDMA, shared memory, device memory.
