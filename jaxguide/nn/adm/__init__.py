"""The UNets and the noisy classifier of Dhariwal & Nichol 2021 (arXiv:2105.05233)."""
