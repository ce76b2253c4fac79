"""Offline: interactions -> semantic IDs -> target and draft -> bundle. torch and transformers live here only.

data.py, synthetic.py     histories and splits          sequences.py   what the models read and what they predict
semantic_ids.py           items -> code paths           trainer.py     the loop both models are trained by
recipe.py                 everything a run may vary     beams.py       beam search through the trie, batched, in torch
pipeline.py               the stages, kept and resumed  evaluate.py    Recall and NDCG beside simple baselines
teacher.py                what the target would say     prompt_trees.py  one pass over prompts and the nodes below them
losses.py                 what a draft is trained by    alignment.py   batches and loss of a draft that is aligned
checkpoints.py            when a run saves and stops    processes.py   one process or many, as accelerate started them
bases.py                  pretrained models by name     stages.py      what is kept, under which key
comparison.py             several losses and seeds      workers.py     several runs at once, a process each
bundles.py                writes the bundle             final_evaluation.py  the test split, before the bundle
"""
