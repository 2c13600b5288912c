"""Installation, the lab, the demo: what brings Flotilla onto a machine and tries it there."""
