"""The API process: HTTP on the unix socket, every request handed to the controller. It never touches KVM or guest
RAM.
"""
