"""Baselines: BERT, GPT-2 and LLaMA families as Hydra configuration groups over ordinary StackWise runs."""
