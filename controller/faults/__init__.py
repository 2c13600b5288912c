"""Faults as an interface: what `vm.…fault-inject` asks for, whether it makes sense, and how it is done."""
