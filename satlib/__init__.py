"""satlib: kernels for the companion to "Defending Against Universal Perturbations With Shared Adversarial Training"."""

__version__ = "0.1.0"
