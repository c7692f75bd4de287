"""MONAI Label, typed: no other room imports it; its interfaces over the project's own rooms."""
