"""Migration as the controllers see it: who owns the guest, in which order, and what is done when anything dies.

docs/migration.md has the protocol with its drawing; migration_agent/ is the process that carries the messages.
"""
