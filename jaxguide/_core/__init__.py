"""What the whole library uses: types, dataclasses that are pytrees, checks, random keys, files and devices."""
