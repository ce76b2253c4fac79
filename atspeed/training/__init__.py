"""Offline training: from interactions to a bundle. Only this package needs torch.

data.py, synthetic.py     histories and splits          sequences.py     training sequences from histories
semantic_ids.py           items -> code paths           trainer.py       the training loop of target and draft
recipe.py                 the settings of a run         beams.py         batched beam search through the trie, in torch
pipeline.py               the stages of a run           evaluate.py      Recall and NDCG beside simple baselines
teacher.py                the target's answers          prompt_trees.py  one pass over prompts and the nodes below them
losses.py                 the losses of a draft         alignment.py     batches and loss of a draft that is aligned
checkpoints.py            when a run saves and stops    processes.py     the processes of a distributed run
bases.py                  pretrained models by name     stages.py        stages that are kept, by the hash of their inputs
comparison.py             drafts by losses and seeds    workers.py       several runs at once, a process each
bundles.py                writes the bundle             final_evaluation.py  the test split, before the bundle
"""
