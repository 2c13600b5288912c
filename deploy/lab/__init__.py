"""The lab: a real KVM host (emulated AMD SVM under QEMU) for machines that have none, built from Debian packages.

    archive.py   initramfs archives (newc cpio)
    kernel.py    what is done to kernel files: ELF out of a bzImage, an .initrd section, a UKI
    debian.py    packages and root trees from the Debian mirror that apt uses
    cache.py     content-addressed results under the cache folder
    images.py    the recipes: which file of the lab is made from what
    nested.py    more of them, for the nested example, built when they are asked for
    machine.py   one start of the lab machine: QEMU, its ports, the verdict
    run.py       one run of a script or shell in it: staging, retries
    __main__.py  deploy/lab.sh
"""
