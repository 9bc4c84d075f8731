"""The version of this package; setuptools reads it from the source."""

__version__ = "0.1.0"
