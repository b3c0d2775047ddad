"""From and to torch MACE files; the only package that may know their format."""
