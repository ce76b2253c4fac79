"""Offline training: from interactions to a bundle. Only this package needs torch.

data.py, synthetic.py     histories and splits          sequences.py     training sequences from histories
semantic_ids.py           items -> code paths           trainer.py       the training loop of target and draft
recipe.py                 the settings of a run         beams.py         batched beam search through the trie, in torch
pipeline.py               the stages of a run           evaluate.py      Recall and NDCG beside simple baselines
teacher.py                the target's answers          prompt_trees.py  one pass over prompts and the nodes below them
alignment_batches.py      batches of an alignment       alignment.py     losses of an alignment
losses.py                 formulas of the losses        stages.py        stages that are kept, by the hash of their inputs
checkpoints.py            when a run saves and stops    processes.py     the processes of a distributed run
bases.py                  pretrained models by name     workers.py       several runs at once, a process each
comparison.py             drafts by losses and seeds    final_evaluation.py  the test split, before the bundle
run.py                    folders and settings of a run distillation.py  a draft for a bundle's target
draft_stages.py           the stages of a draft
bundles.py                writes the bundle             inflated_bundles.py  writes a bundle of inflated models
"""
