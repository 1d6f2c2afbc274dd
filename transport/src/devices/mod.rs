//! RDMA devices and ports of this machine, as sysfs tells them.
