"""Replay-attack detection (Lavrentyeva et al., arXiv 1705.08858 and Interspeech 2017) on specqd."""
