"""`flashrt bench --gpu-model`: expected times of a shape, from published figures."""
