"""Plans of networks, the trained segmenter and assessor, augmentation and inference."""
