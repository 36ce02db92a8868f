"""dino_lab: a laboratory for DINO self-distillation (arXiv:2104.14294)."""

__version__ = "0.1.0"
