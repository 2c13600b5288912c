"""vCPU processes: the native run loop, its exactly-once protocol, and the state of a vCPU."""
