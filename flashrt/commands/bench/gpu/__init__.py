"""`flashrt bench --device cuda`: kernels, graphs and capsules by the device's own clock."""
