"""The probe guest: a freestanding PVH kernel that tests a VMM, its build and the parser of its lines."""
