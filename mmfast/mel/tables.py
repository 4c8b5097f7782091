"""Windows, filter banks and DCT matrices of a `MelConfig`."""
