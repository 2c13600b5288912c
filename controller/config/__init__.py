"""What the user asked for: command line, option strings, VmConfig and its JSON, checks, device ids and PCI
slots.
"""
