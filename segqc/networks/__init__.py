"""The networks: plan, U-Net, model files, inference, the segmenter and the assessor (SegQC-Net)."""
