"""The migration agent: one migration's byte stream, its framing and its clock. It relays and decides nothing."""
