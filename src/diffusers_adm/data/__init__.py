"""What comes off the disk: images, labels, captions, masks, tokenizers, and fingerprints of what was read."""
