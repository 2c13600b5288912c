"""Firmware tables: ACPI, SMBIOS and the MP table."""
