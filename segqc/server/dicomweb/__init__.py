"""DICOMweb on a folder of scans, read-only: what OHIF and other DICOMweb clients read scans by (DICOM PS3.18).

Each scan is a study of one series, with an image for each slice across the through-plane axis. Nothing is written to
the disk: images are made when they are asked for, and kept in memory up to a bound.
"""
