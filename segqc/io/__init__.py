"""Other programs' folders in and out, and everything the store knows as tables and as an archive."""
