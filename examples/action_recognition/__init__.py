"""Action recognition in real time: the Video Transformer Network (Kozlov et al., arXiv 1905.08711) on specqd."""
