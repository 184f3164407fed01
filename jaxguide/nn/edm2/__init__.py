"""EDM2's magnitude-preserving UNet (Karras et al. 2024, arXiv:2312.02696)."""
