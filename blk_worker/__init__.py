"""A disk as a process: a vhost-user back end for virtio-blk over raw files and block devices."""
