"""A DICOMweb PACS as where scans come from and where final labels go."""
