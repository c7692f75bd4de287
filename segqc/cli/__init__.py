"""The command: one module a group of commands; they read flags, delegate and print."""
