"""The VM owner: KVM VM, guest RAM, platform, supervision and the commit decision (see docs/architecture.md)."""
