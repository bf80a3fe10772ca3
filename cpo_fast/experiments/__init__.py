"""Experiments that use the package as a user would; no part of the product depends on them."""
