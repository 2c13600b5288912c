"""What several of Flotilla's processes need; nothing here imports a process package."""
