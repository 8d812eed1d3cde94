"""CONTRACT: the version of Sluice, which the package's metadata are built from. Light."""

VERSION = "0.1.0"
