"""The command `segqc`, a module for each group of commands."""
