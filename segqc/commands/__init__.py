"""Groups of commands, each a module: they read flags, call the library and print what it returns."""
