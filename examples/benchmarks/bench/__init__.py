"""The bench: methods held against each other on the same users and the same ruler; nothing installed imports it.

Its programs are `compare.py` and `candidates.py` beside it. From what is asked to what is printed:

- `plan`: what a YAML file of `compare.py` may say; `plan_file`: how it is read and changed by the command line.
- `cells`: a method with a seed, named by what decides its result and kept on disk; `comparison` makes and runs those
  of a plan, `answer_cells` those of `candidates.py`, `processes` gives each a process of its own.
- `methods`: the register of methods. `trial` is what a method is given and gives; `id_methods` tune no language model;
  `tuners` and `tuned_training` are every way to tune one, `tuned_methods` runs them; `llamarec` and `answering` choose
  among candidates; `trial_run` is what all that tune one have in common, `frozen_recommenders` what they read.
- `candidates`: prompts that show candidates, letters, written titles, and their training.
- `pooling`: the states of a LoRA, a tuned prompt or a whole model as embeddings; `rivals`: models beside them.
- `tables`: JSON, Markdown and pictures of finished cells; `bootstrap`: whether one method beats another.

A room imports rooms that stand above `tables` and before it in this order: cells, candidates, methods, plan.
"""
