"""The autoencoder of latent diffusion (Rombach et al. 2022, arXiv:2112.10752)."""
