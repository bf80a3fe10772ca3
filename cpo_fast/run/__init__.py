"""A run: its flags, folder, data, starting model and stages."""
