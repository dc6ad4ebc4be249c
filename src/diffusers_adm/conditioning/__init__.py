"""What a U-Net is given besides the noisy sample and the timestep: one file a kind of condition, and guidance."""
