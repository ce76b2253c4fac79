"""Offline: interactions -> semantic IDs -> target and draft -> bundle. torch and transformers live here only.

data.py, synthetic.py     histories and splits          sequences.py   what the models read and what they predict
semantic_ids.py           items -> code paths           trainer.py     the loop both models are trained by
recipe.py                 everything a run may vary     beams.py       beam search through the trie, batched, in torch
pipeline.py               the stages, kept and resumed  evaluate.py    Recall and NDCG beside simple baselines
"""
