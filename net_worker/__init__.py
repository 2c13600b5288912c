"""A network card as a process: a vhost-user back end for virtio-net on TAP descriptors."""
