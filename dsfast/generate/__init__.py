"""`python -m dsfast.generate`, and the function `dsfast.generate`.

dsfast/__init__.py takes the function from here. That imports this package first and then binds the name `generate` to
the function, so that no later import of the package can put the package in the function's place.
"""

from dsfast.model import generate

__all__ = ["generate"]
