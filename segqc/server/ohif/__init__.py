"""OHIF on the scans of a folder: which one is served, and our extension for it.

The extension is one module for three hosts: the OHIF that MONAI Label's package carries, a newer one that
``segqc ohif`` installs, and one of a hospital's own, which loads the module from this server.
"""
