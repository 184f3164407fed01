"""What every room stands on: types, dataclasses that are pytrees, checks, keys, files and devices."""
