"""The sparse autoencoder: model, codes, training."""
