"""The networks of EDM (Karras et al. 2022, arXiv:2206.00364): DDPM++, NCSN++ and ADM."""
