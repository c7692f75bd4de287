"""SegQC: estimate how good a segmentation mask is, show where it is wrong, and ask for the right correction next."""

__version__ = "0.1.0"
