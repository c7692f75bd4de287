"""The store: every scan, label version, estimate, hand-out and correction, in SQLite or PostgreSQL."""
