"""virtio-console and virtio-rng, as two vhost-user back ends in one small process."""
