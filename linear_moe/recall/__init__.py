"""Multi-query associative recall: does a mixer remember, beside others of equal state, parameters or time?

task.py draws the sequences, models.py holds the small language models, matching.py finds the baselines that equal a
MoM model in one respect, training.py trains many models at once, timing.py times the step of one, records.py keeps the
rows, runs.py decides what to train next and on which GPU, report.py writes the table and the pictures.
Needs torch, triton, numpy and matplotlib, and nothing of Megatron.
"""
