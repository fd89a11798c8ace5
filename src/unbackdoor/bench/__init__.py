"""The grid: models x attacks x defenses x seeds."""
