"""Tests, as a package of this name, so that no other `tests` on the path is taken for it."""
