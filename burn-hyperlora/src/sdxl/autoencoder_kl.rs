//! The image autoencoder: photos to latents and back.
