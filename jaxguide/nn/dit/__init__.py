"""Transformers of latents: DiT, SiT, REPA's SiT and LightningDiT, made of one block."""
