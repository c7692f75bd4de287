"""HTTP: MONAI Label's interface, served without its holes and without one client blocking another."""
