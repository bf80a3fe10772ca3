"""The version, read by setup.py, the package and every summary.json."""

__version__ = "0.1.0"
