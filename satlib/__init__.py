"""satlib: kernels for the companion to "Defending Against Universal Perturbations With Shared Adversarial Training"."""

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`satlib.evaluate`, loaded when it is asked for: whatever else one imports does not wait for PyTorch."""
    if name == "evaluate":
        from satlib.evaluation import evaluate

        return evaluate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
