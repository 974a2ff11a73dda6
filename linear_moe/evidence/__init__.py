"""Language models on real text that differ in their token mixer alone: which remembers what it has read?

texts.py            the sources and documentation of the Python installation, split by package
jobs.py             the models, and their arguments of `linear_moe.pretrain`
fit.py              a rehearsal of every model, and the tokens that fit the time
runs.py             trains and measures the models on the GPUs of the machine
recorded_run.py     the process that trains a model
trained_model.py    a trained model, from its checkpoint
measure.py          the process that reads held-out text with a trained model
memories.py         the process that looks at what its memories hold
repeats.py          the tokens that could be recalled from the context
held_out.py         windows of held-out text, and what their losses say
tables.py           the rows of finished models; classes.py groups them
report.py           tables; pictures.py and memory_pictures.py draw
recall_summary.py   the associative recall experiment, from the rows of all its runs
results.py          the parts of RESULTS.md
"""
