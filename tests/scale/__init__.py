"""What many ranks are measured by: `make scale` (tests/scale/__main__.py)."""
