"""MONAI Label's interfaces over the project's own rooms."""
