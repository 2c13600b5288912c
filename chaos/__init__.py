"""`flotilla chaos`: a campaign of faults against a running VM, over its API socket, with the guest's data verified."""
