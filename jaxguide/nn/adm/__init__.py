"""The UNets and the noise-aware classifier of Dhariwal & Nichol 2021 (arXiv:2105.05233)."""
